"""Preference objectives: pure functions of log-probabilities, with an explicit state.

May import `kernels` and `errors`; knows nothing of a run's settings. Start in `base`;
`mixture` builds one by its name.

To add one: a function ``terms(pairs, hyperparameters, state) -> Terms`` in a file of `losses`, a
frozen dataclass of hyperparameters, and a row of the table there.
"""

from .base import Objective
from .losses import ALIASES, OBJECTIVES
from .mixture import build_objective, canonical_name, hyperparameters_of, parts_of, spec_of
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
