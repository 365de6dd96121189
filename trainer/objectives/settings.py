"""Hyperparameters of objectives: declared, documented and validated in one place."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from ..errors import UserError, is_number

T = TypeVar("T")


def setting(
    default: T,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> T:
    """A documented dataclass field; its type is the default's, its range the bounds given."""
    bounds = {">": above, ">=": at_least, "<": below, "<=": at_most}
    metadata = {
        "help": help,
        "bounds": {sign: bound for sign, bound in bounds.items() if bound is not None},
        "choices": choices,
    }
    return cast(T, dataclasses.field(default=default, metadata=metadata))


@dataclass(frozen=True)
class Hyperparameters:
    """What every objective has; each adds its own fields. Constructing one validates it."""

    LIKELIHOOD: ClassVar[bool] = False  # whether the objective has a likelihood term of its own
    LOSSES_OF_PAIRS: ClassVar[bool] = True  # whether a loss is that of one pair's two answers

    sft_weight: float = setting(
        0.0, "this multiple of minus the chosen mean logp is added to each loss", at_least=0
    )
    nll: str = setting(
        "answers",
        "what likelihood terms average: each chosen answer and then pairs, or all their tokens, or "
        "those of the prompts too",
        choices=("answers", "tokens", "prompt_and_answer"),
    )

    use_weighting: bool = setting(
        False, "multiply a pair's loss by how likely the policy is to write its answers (WPO)"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if "bounds" in field.metadata:  # those without are a mixture's, checked by its parts
                value = validated(field, getattr(self, field.name))
                object.__setattr__(self, field.name, value)
        if self.nll != "answers" and not (self.LIKELIHOOD or self.sft_weight):
            raise UserError(
                f"nll: set sft_weight above 0 beside it; without, {self.nll} has nothing to count"
            )
        if self.use_weighting and not self.LOSSES_OF_PAIRS:
            raise UserError(
                "use_weighting: leave it out; aot sorts answers, listwise objectives rank them and "
                "others take single ones, so no loss is one pair's"
            )


@dataclass(frozen=True)
class LabelSmoothing(Hyperparameters):
    label_smoothing: float = setting(
        0.0, "assumed probability that a pair's label is wrong", at_least=0, at_most=0.5
    )


def validated(field: dataclasses.Field[Any], value: Any) -> Any:
    """``value`` as the field's type, or a UserError that says what the field takes."""
    kind = type(field.default)
    if kind is float and isinstance(value, int) and is_number(value):
        value = float(value)
    choices = field.metadata["choices"]
    bounds = field.metadata["bounds"]
    if (
        type(value) is kind
        and (choices is None or value in choices)
        and not (kind is float and not math.isfinite(value))
        and all(_holds(value, sign, bound) for sign, bound in bounds.items())
    ):
        return value
    raise UserError(
        f"{field.name} ({field.metadata['help']}): expected {_expected(kind, choices, bounds)}, "
        f"got {value!r}; the default is {field.default!r}"
    )


def _holds(value: float, sign: str, bound: float) -> bool:
    if sign == ">":
        return value > bound
    if sign == ">=":
        return value >= bound
    return value < bound if sign == "<" else value <= bound


def _expected(kind: type, choices: tuple[Any, ...] | None, bounds: dict[str, float]) -> str:
    if choices is not None:
        return "one of " + ", ".join(map(str, choices))
    noun = {float: "a number", int: "a whole number", bool: "true or false"}[kind]
    limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items())
    return f"{noun} {limits}".rstrip()


def unknown_name(
    what: str,
    name: str,
    known: Iterable[str],
    owners: Mapping[str, str] | None = None,
    remedy: str = "",
) -> UserError:
    """The error for a name that is not known: the nearest known one, then all of them.

    ``owners`` says of some known names what they belong to. ``remedy`` comes before the list.
    """
    known, of = list(known), owners or {}
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    listed = ", ".join(f"{each} (of {of[each]})" if of.get(each) else each for each in known)
    return UserError(f"{what} {name!r} is not known; {hint}{remedy}Known: {listed}")
