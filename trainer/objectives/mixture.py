"""Weighted sums of objectives: ``{dpo: 0.8, bco: 0.2, sft: 1}``, or ``0.8*dpo + 0.2*bco + sft``.

A hyperparameter's value goes to every part that has one of this name; where none is given each part
keeps its own default. Rewards and target margins are those of the first part that ranks answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, ClassVar

from torch import Tensor

from ..errors import UserError
from .losses import ALIASES, OBJECTIVES
from .settings import Hyperparameters, unknown_name
from .terms import ObjectiveSpec, Pairs, State, Terms

Parts = tuple[tuple[str, float], ...]


def spec_of(name: str) -> ObjectiveSpec:
    """The row of an objective or of a mixture."""
    name = canonical_name(name)
    return OBJECTIVES[name] if name in OBJECTIVES else _mixed(parts_of(name))


def canonical_name(name: str | Mapping[str, float]) -> str:
    """An objective's or a mixture's name with aliases resolved; a UserError for an unknown one."""
    parts = parts_of(name)
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return " + ".join(part if weight == 1 else f"{weight:g}*{part}" for part, weight in parts)


def parts_of(name: str | Mapping[str, float]) -> Parts:
    """The objectives of a mixture, by any of its forms, each with its weight."""
    if isinstance(name, Mapping):
        given = list(name.items())
    else:
        terms = [term.rpartition("*") for term in str(name).split(" + ")]
        given = [(part.strip(), weight.strip() or 1) for weight, _, part in terms]
    parts = [(_known(str(part)), _weight(part, weight)) for part, weight in given]
    names = [part for part, _ in parts]
    if not parts or len(set(names)) < len(names):
        raise UserError(f"objective: name each part once, with its weight; got {name!r}")
    return tuple(parts)


def _known(name: str) -> str:
    resolved = ALIASES.get(name, name)
    if resolved not in OBJECTIVES:
        raise unknown_name("objective", name, [*OBJECTIVES, *ALIASES])
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
            _part(name, self)


@cache
def _mixed(parts: Parts) -> ObjectiveSpec:
    specs = {name: OBJECTIVES[name] for name, _ in parts}
    kind = _hyperparameters(parts)
    return ObjectiveSpec(
        " + ".join(f"{weight:g} ({specs[name].formula})" for name, weight in parts),
        kind,
        partial(_terms, parts),
        partial(_initial_state, parts),
        couples_pairs=any(spec.couples_pairs for spec in specs.values()),
        needs_reference=any(spec.needs_reference for spec in specs.values()),
        takes_margins=any(spec.takes_margins for spec in specs.values()),
    )


def _hyperparameters(parts: Parts) -> type[Hyperparameters]:
    """The fields of all parts; the default is None where the parts have different ones."""
    kinds = [OBJECTIVES[name].hyperparameters for name, _ in parts]
    fields: dict[str, Any] = {}
    for field in (field for kind in kinds for field in dataclasses.fields(kind)):
        first = fields.setdefault(field.name, field)
        if first.default != field.default:
            unset = {"help": f"{field.metadata['help']}; none: each part's own default"}
            fields[field.name] = dataclasses.field(default=None, metadata=unset)
    common = {field.name for field in dataclasses.fields(Hyperparameters)}
    return dataclasses.make_dataclass(
        "MixtureHyperparameters",
        [
            (name, Any, dataclasses.field(default=field.default, metadata=field.metadata))
            for name, field in fields.items()
            if name not in common
        ],
        bases=(_Shared,),
        namespace={
            "PARTS": parts,
            "LIKELIHOOD": any(kind.LIKELIHOOD for kind in kinds),
            "LOSSES_OF_PAIRS": all(kind.LOSSES_OF_PAIRS for kind in kinds),
        },
        frozen=True,
    )


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
        terms = OBJECTIVES[name].terms(pairs, _part(name, hp), own)
        losses = losses + weight * terms.losses
        states |= {f"{name}.{key}": value for key, value in (terms.state or {}).items()}
        if ranking is None or ranking[0] == "sft":
            ranking = name, terms
    assert ranking is not None
    assert isinstance(losses, Tensor)
    return dataclasses.replace(ranking[1], losses=losses, state=states)


def _of(key: str) -> str:
    return key.partition(".")[0]
