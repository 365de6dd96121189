"""Objectives by name: one of the table, or a weighted sum of several.

A sum is ``{dpo: 0.8, bco: 0.2, sft: 1}`` or ``0.8*dpo + 0.2*bco + sft``. A hyperparameter's value
goes to every part that has one of this name; where none is given each part keeps its own default.
Rewards and target margins are those of the first part that ranks answers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

from torch import Tensor

from ..errors import UserError
from .base import Objective
from .losses import ALIASES, OBJECTIVES
from .settings import Hyperparameters, unknown_name
from .terms import ObjectiveSpec, Pairs, State, Terms, terms_of

Parts = tuple[tuple[str, float], ...]

PLUS = re.compile(r"(?<![\d.][eE])\+")
"""Between parts; the one in a weight such as 1e+2 is none."""
OWN = "One of your own needs a script that imports its file, see docs/objectives.md. "


def build_objective(name: str | Mapping[str, float], **hyperparameters: Any) -> Objective:
    """The objective ``name``, in training mode, with an empty state.

    Args:
        name: a key of ``OBJECTIVES`` or of ``ALIASES``; or several of them with their weights,
            ``{"dpo": 0.8, "sft": 1}``, as one mixture.
        hyperparameters: values for the fields of ``hyperparameters_of(name)``; the others keep
            their defaults.
    """
    name = canonical_name(name)
    known = hyperparameters_of(name)
    for key in hyperparameters:
        if key not in known:
            owners = {n: ", ".join(_owners(name, n)) for n in known}
            raise unknown_name(f"hyperparameter of {name}", key, known, owners)
    spec = spec_of(name)
    return Objective(name, spec, spec.hyperparameters(**hyperparameters))


def hyperparameters_of(name: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of an objective's hyperparameters by name: ``default``, ``metadata["help"]``."""
    spec = spec_of(name)
    return {field.name: field for field in dataclasses.fields(spec.hyperparameters)}


def _owners(mixture: str, hyperparameter: str) -> list[str]:
    """The parts of a mixture that have this hyperparameter, where not all do."""
    parts = [part for part, _ in parts_of(mixture)]
    owners = [part for part in parts if hyperparameter in hyperparameters_of(part)]
    return owners if len(owners) < len(parts) else []


def spec_of(name: str) -> ObjectiveSpec:
    """The row of an objective or of a mixture."""
    name = canonical_name(name)
    return OBJECTIVES[name] if name in OBJECTIVES else _mixed(parts_of(name))


def canonical_name(name: str | Mapping[str, float]) -> str:
    """An objective's or a mixture's name with aliases resolved; a UserError for an unknown one."""
    parts = parts_of(name)
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return " + ".join(
        part if weight == 1 else f"{_shortest(weight)}*{part}" for part, weight in parts
    )


def _shortest(weight: float) -> str:
    """A weight in as few digits as give it back."""
    return repr(weight).removesuffix(".0")


def parts_of(name: str | Mapping[str, float]) -> Parts:
    """The objectives of a mixture, by any of its forms, each with its weight."""
    if isinstance(name, Mapping):
        given = list(name.items())
    else:
        terms = [term.rpartition("*") for term in PLUS.split(str(name))]
        given = [(part.strip(), weight.strip() or 1) for weight, _, part in terms]
    parts = [(_known(str(part)), _weight(part, weight)) for part, weight in given]
    names = [part for part, _ in parts]
    if not parts or len(set(names)) < len(names):
        raise UserError(f"objective: name each part once, with its weight; got {name!r}")
    return tuple(parts)


def _known(name: str) -> str:
    resolved = ALIASES.get(name, name)
    if resolved not in OBJECTIVES:
        raise unknown_name("objective", name, [*OBJECTIVES, *ALIASES], remedy=OWN)
    return resolved


def _weight(part: str, weight: Any) -> float:
    try:
        value = float(weight)
    except (TypeError, ValueError):
        value = 0.0
    if isinstance(weight, bool) or not 0 < value < float("inf"):
        raise UserError(f"objective: give {part} a weight above 0, got {weight!r}")
    return value


@dataclasses.dataclass(frozen=True)
class _Shared(Hyperparameters):
    """Of a mixture; its parts check what they get."""

    PARTS: ClassVar[Parts] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, _ in self.PARTS:
            with _named(name):
                _part(name, self)


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Errors inside say which part of the mixture they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} ({part}, a part of the mixture)") from None


@cache
def _mixed(parts: Parts) -> ObjectiveSpec:
    specs = {name: OBJECTIVES[name] for name, _ in parts}
    takes = [spec.takes for spec in specs.values()]
    if not (common := tuple(kind for kind in takes[0] if all(kind in each for each in takes))):
        raise UserError(
            f"objective: leave one of {', '.join(specs)} out, as they train on different data: "
            "pairs, lists of scored answers, or single answers"
        )
    kind = _hyperparameters(parts)
    return ObjectiveSpec(
        " + ".join(f"{_shortest(weight)} ({specs[name].formula})" for name, weight in parts),
        kind,
        partial(_terms, parts),
        partial(_initial_state, parts),
        couples_pairs=any(spec.couples_pairs for spec in specs.values()),
        needs_reference=any(spec.needs_reference for spec in specs.values()),
        takes_margins=any(spec.takes_margins for spec in specs.values()),
        takes=common,
    )


def _hyperparameters(parts: Parts) -> type[Hyperparameters]:
    """The fields of all parts; the default is None where the parts have different ones."""
    kinds = [OBJECTIVES[name].hyperparameters for name, _ in parts]
    common = {field.name for field in dataclasses.fields(Hyperparameters)}
    fields: dict[str, dict[str, dataclasses.Field[Any]]] = {}
    for (part, _), kind in zip(parts, kinds, strict=True):
        for field in dataclasses.fields(kind):
            if field.name not in common:
                fields.setdefault(field.name, {})[part] = field
    return dataclasses.make_dataclass(
        "MixtureHyperparameters",
        [(name, Any, _shared(owners)) for name, owners in fields.items()],
        bases=(_Shared,),
        namespace={
            "PARTS": parts,
            "LIKELIHOOD": any(kind.LIKELIHOOD for kind in kinds),
            "LOSSES_OF_PAIRS": all(kind.LOSSES_OF_PAIRS for kind in kinds),
        },
        frozen=True,
    )


def _shared(owners: dict[str, dataclasses.Field[Any]]) -> Any:
    """One field for those of the parts, by name, which check its values themselves."""
    helps = {part: field.metadata["help"] for part, field in owners.items()}
    text = "; ".join(
        f"{help} ({', '.join(part for part in helps if helps[part] == help)})"
        for help in dict.fromkeys(helps.values())
    )
    defaults = [field.default for field in owners.values()]
    if all(default == defaults[0] for default in defaults):
        return dataclasses.field(default=defaults[0], metadata={"help": text})
    text += "; none: each part's own default"
    return dataclasses.field(default=None, metadata={"help": text})


def _part(name: str, hp: Any) -> Any:
    """The hyperparameters of one part, but for what is added to the sum of losses once."""
    kind = OBJECTIVES[name].hyperparameters
    values = {field.name: getattr(hp, field.name) for field in dataclasses.fields(kind)}
    values |= {
        "sft_weight": 0.0,
        "use_weighting": False,
        "nll": hp.nll if kind.LIKELIHOOD else "answers",
    }
    return kind(**{key: value for key, value in values.items() if value is not None})


def _initial_state(parts: Parts, hp: Any) -> State:
    states: State = {}
    for name, _ in parts:
        initial = OBJECTIVES[name].initial_state
        own = {} if initial is None else initial(_part(name, hp))
        states |= {f"{name}.{key}": value for key, value in own.items()}
    return states


def _terms(parts: Parts, pairs: Pairs, hp: Any, state: State) -> Terms:
    ranking, states = None, dict(state)
    losses: Tensor | float = 0.0
    for name, weight in parts:
        own = {key.partition(".")[2]: value for key, value in state.items() if _of(key) == name}
        terms = terms_of(name, OBJECTIVES[name], pairs, _part(name, hp), own)
        losses = losses + weight * terms.losses
        states |= {f"{name}.{key}": value for key, value in (terms.state or {}).items()}
        if ranking is None or ranking[0] == "sft":
            ranking = name, terms
    assert ranking is not None
    assert isinstance(losses, Tensor)
    return dataclasses.replace(ranking[1], losses=losses, state=states)


def _of(key: str) -> str:
    return key.partition(".")[0]
