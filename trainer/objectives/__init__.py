"""Preference objectives: pure functions of log-probabilities, with an explicit state.

May import `kernels` and `errors`; knows nothing of a run's settings. Start in `base`.

To add one: a function ``terms(pairs, hyperparameters, state) -> Terms`` in a new file, a
frozen dataclass of hyperparameters, and a row here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from . import beta_po, cpo, dpo, gamma_po, kto, lmpo, orpo, simpo
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
        gamma_po.GammaSimpoHyperparameters,
        gamma_po.gamma_simpo_terms,
        gamma_po.initial_state,
        couples_pairs=True,
    ),
    "gamma-dpo": ObjectiveSpec(
        "-(1-e) log sigmoid(R - (gamma_i - g)) - e log sigmoid((gamma_i - g) - R)",
        gamma_po.GammaDpoHyperparameters,
        gamma_po.gamma_dpo_terms,
        gamma_po.initial_state,
        couples_pairs=True,
        needs_reference=True,
    ),
    "beta-simpo": ObjectiveSpec(
        "simpo of the pairs drawn, with beta_used",
        beta_po.BetaSimpoHyperparameters,
        beta_po.beta_simpo_terms,
        beta_po.initial_state,
        couples_pairs=True,
    ),
    "beta-dpo": ObjectiveSpec(
        "dpo of the pairs drawn, with beta_used",
        beta_po.BetaDpoHyperparameters,
        beta_po.beta_dpo_terms,
        beta_po.initial_state,
        couples_pairs=True,
        needs_reference=True,
    ),
    "dpo": ObjectiveSpec(
        "-(1-e) log sigmoid(R) - e log sigmoid(-R)",
        dpo.DpoHyperparameters,
        dpo.dpo_terms,
        needs_reference=True,
    ),
    "r-dpo": ObjectiveSpec(
        "-log sigmoid(R + alpha (n_w - n_l))",
        dpo.RdpoHyperparameters,
        dpo.rdpo_terms,
        needs_reference=True,
    ),
    "ipo": ObjectiveSpec(
        "(R / beta - 1 / (2 beta))^2, R per token",
        dpo.IpoHyperparameters,
        dpo.ipo_terms,
        needs_reference=True,
    ),
    "kto": ObjectiveSpec(
        "mean of 1 - sigmoid(r_w - beta KL_l) and 1 - sigmoid(beta KL_w - r_l)",
        dpo.ReferenceHyperparameters,
        kto.kto_terms,
        couples_pairs=True,
        needs_reference=True,
    ),
    "cpo": ObjectiveSpec(
        "-log sigmoid(beta (s_w - s_l)) - alpha mean_w",
        cpo.CpoHyperparameters,
        cpo.cpo_terms,
    ),
    "orpo": ObjectiveSpec(
        "-mean_w - alpha log sigmoid(log_odds_w - log_odds_l)",
        orpo.OrpoHyperparameters,
        orpo.orpo_terms,
    ),
}
"""By name. In the formulas D is the gap of mean logps times beta, R that of rewards
``r = beta (s - s_ref)``, g the base target margin and e the label smoothing."""

ALIASES = {
    "sigmoid": "simpo",
    "gm-simpo": "gamma-simpo",
    "gm-dpo": "gamma-dpo",
    "b-simpo": "beta-simpo",
    "b-dpo": "beta-dpo",
}


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
