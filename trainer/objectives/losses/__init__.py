"""The losses, family by family, and the table of all objectives.

A module has the functions and hyperparameters of one family. Start in `dpo` or `simpo`, whose rows
are here; a family with many rows has its own table, ``ROWS``.
"""

from __future__ import annotations

from ..terms import ObjectiveSpec
from . import (
    across_pairs,
    beta_po,
    cpo,
    dpo,
    gamma_po,
    kto,
    listwise,
    lmpo,
    orpo,
    reward_losses,
    simpo,
)

OBJECTIVES: dict[str, ObjectiveSpec] = {
    "simpo": ObjectiveSpec(
        "-(1-e) log sigmoid(D - g) - e log sigmoid(g - D)",
        simpo.SimpoHyperparameters,
        simpo.simpo_terms,
        takes_margins=True,
    ),
    "hinge": ObjectiveSpec(
        "max(0, 1 - (D - g))",
        simpo.MarginHyperparameters,
        simpo.hinge_terms,
        takes_margins=True,
    ),
    "alphapo": ObjectiveSpec(
        "simpo of r = beta (1 - exp(-alpha mean)) / alpha",
        simpo.AlphaPoHyperparameters,
        simpo.alphapo_terms,
    ),
    "repo": ObjectiveSpec(
        "max(0, target_margin - (mean_w - mean_l))",
        simpo.RepoHyperparameters,
        simpo.repo_terms,
    ),
    "simper": ObjectiveSpec(
        "exp(mean_l) - exp(mean_w)",
        simpo.Hyperparameters,
        simpo.simper_terms,
    ),
    "sft": ObjectiveSpec("-mean_w", simpo.SftHyperparameters, simpo.sft_terms),
    "lmpo": ObjectiveSpec(
        "-log sigmoid(D - g - lambda z)",
        lmpo.LmpoHyperparameters,
        lmpo.lmpo_terms,
        lmpo.initial_state,
        couples_pairs=True,
        takes_margins=True,
    ),
    "gamma-simpo": ObjectiveSpec(
        "-log sigmoid(D - gamma_i)",
        gamma_po.GammaSimpoHyperparameters,
        gamma_po.gamma_simpo_terms,
        gamma_po.initial_state,
        couples_pairs=True,
        takes_margins=True,
    ),
    "gamma-dpo": ObjectiveSpec(
        "-(1-e) log sigmoid(R - (gamma_i - g)) - e log sigmoid((gamma_i - g) - R)",
        gamma_po.GammaDpoHyperparameters,
        gamma_po.gamma_dpo_terms,
        gamma_po.initial_state,
        couples_pairs=True,
        needs_reference=True,
        takes_margins=True,
    ),
    "beta-simpo": ObjectiveSpec(
        "simpo of the pairs drawn, with beta_used",
        beta_po.BetaSimpoHyperparameters,
        beta_po.beta_simpo_terms,
        beta_po.initial_state,
        couples_pairs=True,
        takes_margins=True,
    ),
    "beta-dpo": ObjectiveSpec(
        "dpo of the pairs drawn, with beta_used",
        beta_po.BetaDpoHyperparameters,
        beta_po.beta_dpo_terms,
        beta_po.initial_state,
        couples_pairs=True,
        needs_reference=True,
        takes_margins=True,
    ),
    "dpo": ObjectiveSpec(
        "-(1-e) log sigmoid(R) - e log sigmoid(-R)",
        dpo.DivergenceDpoHyperparameters,
        dpo.dpo_terms,
        needs_reference=True,
        takes_margins=True,
    ),
    "r-dpo": ObjectiveSpec(
        "-log sigmoid(R + alpha (n_w - n_l))",
        dpo.RdpoHyperparameters,
        dpo.rdpo_terms,
        needs_reference=True,
        takes_margins=True,
    ),
    "ipo": ObjectiveSpec(
        "(R / beta - 1 / (2 beta))^2, R per token",
        dpo.IpoHyperparameters,
        dpo.ipo_terms,
        needs_reference=True,
    ),
    "kto": ObjectiveSpec(
        "mean of 1 - sigmoid(r_w - beta KL_l) and 1 - sigmoid(beta KL_w - r_l)",
        kto.KtoHyperparameters,
        kto.kto_terms,
        couples_pairs=True,
        needs_reference=True,
        takes=("pairs", "labelled"),
    ),
    "apo-zero-unpaired": ObjectiveSpec(
        "1 - sigmoid(r) of a desirable answer, sigmoid(r) of an undesirable one",
        kto.LabelledHyperparameters,
        kto.apo_zero_unpaired_terms,
        needs_reference=True,
        takes=("labelled",),
    ),
    "cpo": ObjectiveSpec(
        "-(1-e) log sigmoid(D) - e log sigmoid(-D) - alpha mean_w, D = beta (s_w - s_l)",
        cpo.SmoothedCpoHyperparameters,
        cpo.cpo_terms,
    ),
    "cpo-hinge": ObjectiveSpec(
        "max(0, 1 - beta (s_w - s_l)) - alpha mean_w",
        cpo.CpoHyperparameters,
        cpo.cpo_hinge_terms,
    ),
    "cpo-ipo": ObjectiveSpec(
        "(mean_w - mean_l - 1 / (2 beta))^2 - alpha mean_w",
        cpo.CpoIpoHyperparameters,
        cpo.cpo_ipo_terms,
    ),
    "orpo": ObjectiveSpec(
        "-mean_w - alpha log sigmoid(log_odds_w - log_odds_l)",
        orpo.OrpoHyperparameters,
        orpo.orpo_terms,
    ),
    **reward_losses.ROWS,
    **across_pairs.ROWS,
    **listwise.ROWS,
}
"""By name. In the formulas D is the gap of mean logps times beta, R that of the rewards
``r = beta (s - s_ref)`` and R = r_w - r_l, g the base target margin and e the label smoothing;
`listwise` explains its own."""

ALIASES = {
    "sigmoid": "simpo",
    "gm-simpo": "gamma-simpo",
    "gm-dpo": "gamma-dpo",
    "b-simpo": "beta-simpo",
    "b-dpo": "beta-dpo",
    "exo_pair": "exo",
    "nca_pair": "nca-pair",
    "bco_pair": "bco-pair",
    "sppo_hard": "sppo",
    "aot_unpaired": "aot-unpaired",
    "apo_zero": "apo-zero",
    "apo_zero_unpaired": "apo-zero-unpaired",
    "apo_down": "apo-down",
    "sigmoid_norm": "dpo-norm",
}
