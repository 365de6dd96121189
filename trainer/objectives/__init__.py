"""Preference objectives: pure functions of log-probabilities, with an explicit state.

May import `kernels` and `errors`; knows nothing of a run's settings. Start in `base`.

To add one: a function ``terms(pairs, hyperparameters, state) -> Terms`` in a file of `losses`, a
frozen dataclass of hyperparameters, and a row of the table there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .base import Objective
from .losses import ALIASES, OBJECTIVES
from .mixture import canonical_name, parts_of, spec_of
from .settings import unknown_name
from .terms import ObjectiveOutput, ObjectiveSpec

__all__ = [
    "ALIASES",
    "OBJECTIVES",
    "Objective",
    "ObjectiveOutput",
    "ObjectiveSpec",
    "build_objective",
    "canonical_name",
    "hyperparameters_of",
    "parts_of",
    "spec_of",
]


def hyperparameters_of(name: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of an objective's hyperparameters by name: ``default``, ``metadata["help"]``."""
    spec = spec_of(name)
    return {field.name: field for field in dataclasses.fields(spec.hyperparameters)}


def _owners(mixture: str, hyperparameter: str) -> list[str]:
    """The parts of a mixture that have this hyperparameter, where not all do."""
    parts = [part for part, _ in parts_of(mixture)]
    owners = [part for part in parts if hyperparameter in hyperparameters_of(part)]
    return owners if len(owners) < len(parts) else []


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
