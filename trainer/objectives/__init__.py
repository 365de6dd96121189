"""Preference objectives: pure functions of log-probabilities, with an explicit state.

To add one: a function ``terms(pairs, hyperparameters, state) -> Terms`` in a file of its own, a
frozen dataclass of hyperparameters, and a row here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from . import gamma_po, lmpo, simpo
from .base import Objective, ObjectiveOutput, ObjectiveSpec
from .settings import unknown_name

__all__ = [
    "ALIASES",
    "OBJECTIVES",
    "Objective",
    "ObjectiveOutput",
    "ObjectiveSpec",
    "build_objective",
    "canonical_name",
    "hyperparameters_of",
]

OBJECTIVES: dict[str, ObjectiveSpec] = {
    "simpo": ObjectiveSpec(
        "-(1-e) log sigmoid(D - g) - e log sigmoid(g - D)",
        simpo.SimpoHyperparameters,
        simpo.simpo_terms,
    ),
    "hinge": ObjectiveSpec(
        "max(0, 1 - (D - g))",
        simpo.MarginHyperparameters,
        simpo.hinge_terms,
    ),
    "lmpo": ObjectiveSpec(
        "-log sigmoid(D - g - lambda z)",
        lmpo.LmpoHyperparameters,
        lmpo.lmpo_terms,
        lmpo.initial_state,
        couples_pairs=True,
    ),
    "gamma-simpo": ObjectiveSpec(
        "-log sigmoid(D - gamma_i)",
        gamma_po.GammaHyperparameters,
        gamma_po.gamma_simpo_terms,
        gamma_po.initial_state,
        couples_pairs=True,
    ),
}

ALIASES = {"sigmoid": "simpo", "gm-simpo": "gamma-simpo"}


def canonical_name(name: str) -> str:
    """``name`` with aliases resolved; a UserError that names the nearest for an unknown one."""
    resolved = ALIASES.get(name, name)
    if resolved not in OBJECTIVES:
        raise unknown_name("objective", name, [*OBJECTIVES, *ALIASES])
    return resolved


def hyperparameters_of(name: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of an objective's hyperparameters by name: ``default``, ``metadata["help"]``."""
    spec = OBJECTIVES[canonical_name(name)]
    return {field.name: field for field in dataclasses.fields(spec.hyperparameters)}


def build_objective(name: str, **hyperparameters: Any) -> Objective:
    """The objective ``name``, in training mode, with an empty state.

    Args:
        name: a key of ``OBJECTIVES`` or of ``ALIASES``.
        hyperparameters: values for the fields of ``hyperparameters_of(name)``; the others keep
            their defaults.
    """
    name = canonical_name(name)
    known = hyperparameters_of(name)
    for key in hyperparameters:
        if key not in known:
            raise unknown_name(f"hyperparameter of {name}", key, known)
    spec = OBJECTIVES[name]
    return Objective(name, spec, spec.hyperparameters(**hyperparameters))
