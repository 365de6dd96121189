"""Every objective with settings, and the plain computation that it must agree with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from widemargin.trainer.objectives import OBJECTIVES

from tests.support import plain_reward_losses as plain
from tests.support.plain_objectives import (
    PlainBetaDpo,
    PlainBetaSimpo,
    PlainCpo,
    PlainDpo,
    PlainGammaDpo,
    PlainGammaSimpo,
    PlainHinge,
    PlainIpo,
    PlainKto,
    PlainLmpo,
    PlainOrpo,
    PlainRdpo,
    PlainSimpo,
)
from tests.support.plain_reward_losses import (
    PlainAlphaPo,
    PlainAot,
    PlainAotUnpaired,
    PlainBco,
    PlainCpoHinge,
    PlainCpoIpo,
    PlainCpoOfTokens,
    PlainFIpo,
    PlainOrpoOfTokens,
    PlainRepo,
    PlainRewards,
    PlainSft,
    PlainSimper,
)

MIXTURE = "0.8*dpo + 0.2*bco + sft"
OF_PAIRS = [name for name, spec in OBJECTIVES.items() if "pairs" in spec.takes]

Case = tuple[str, dict[str, Any], Callable[[], PlainSimpo]]  # name, hyperparameters, in plain form
CASES: dict[str, Case] = {
    "simpo": ("simpo", {}, PlainSimpo),
    "simpo smoothed": (
        "simpo",
        {"beta": 2.5, "gamma_beta_ratio": 0.55, "label_smoothing": 0.1},
        lambda: PlainSimpo(beta=2.5, ratio=0.55, epsilon=0.1),
    ),
    "sigmoid": ("sigmoid", {"beta": 10}, lambda: PlainSimpo(beta=10)),
    "hinge": ("hinge", {"beta": 3.0}, lambda: PlainHinge(beta=3.0)),
    "lmpo": ("lmpo", {}, PlainLmpo),
    "lmpo published": (
        "lmpo",
        {"zscore_bias_correction": False, "beta": 2.5, "gamma_beta_ratio": 0.8},
        lambda: PlainLmpo(beta=2.5, ratio=0.8, correct=False),
    ),
    "lmpo sigmoid": (
        "lmpo",
        {"margin_shape": "sigmoid", "margin_weight": 0.5, "zscore_decay": 0.5},
        lambda: PlainLmpo(shape="sigmoid", weight=0.5, decay=0.5),
    ),
    "lmpo log": (
        "lmpo",
        {"margin_shape": "log", "margin_length_norm": False},
        lambda: PlainLmpo(shape="log", length_norm=False),
    ),
    "lmpo cubic": ("lmpo", {"margin_power": 3}, lambda: PlainLmpo(power=3)),
    "gamma-simpo": ("gamma-simpo", {}, PlainGammaSimpo),
    "gm-simpo": (
        "gm-simpo",
        {"beta": 10, "gamma_beta_ratio": 0.4, "tau": 1.0, "sampling_seed": 5},
        lambda: PlainGammaSimpo(beta=10, ratio=0.4, tau=1.0, seed=5),
    ),
    "gamma-simpo, small tau": ("gamma-simpo", {"tau": 0.2}, lambda: PlainGammaSimpo(tau=0.2)),
    "gamma-dpo": ("gamma-dpo", {}, PlainGammaDpo),
    "gm-dpo": (
        "gm-dpo",
        {
            "beta": 0.5,
            "gamma_beta_ratio": 3,
            "tau": 0.5,
            "sampling_seed": 2,
            "label_smoothing": 0.1,
            "length_norm": True,
        },
        lambda: PlainGammaDpo(beta=0.5, ratio=3.0, tau=0.5, seed=2, epsilon=0.1, length_norm=True),
    ),
    "beta-simpo": ("beta-simpo", {}, PlainBetaSimpo),
    "b-simpo": (
        "b-simpo",
        {
            "tau": 20.0,  # beta reaches its least value
            "gamma_beta_ratio": 0.3,
            "label_smoothing": 0.2,
            "sample_fraction": 0.35,
            "gap_decay": 0.5,
            "sampling_seed": 3,
        },
        lambda: PlainBetaSimpo(tau=20.0, ratio=0.3, epsilon=0.2, fraction=0.35, decay=0.5, seed=3),
    ),
    "beta-dpo": ("beta-dpo", {}, PlainBetaDpo),
    "b-dpo": (
        "b-dpo",
        {"beta": 1.0, "label_smoothing": 0.1, "length_norm": True, "sampling_seed": 1},
        lambda: PlainBetaDpo(beta=1.0, epsilon=0.1, length_norm=True, seed=1),
    ),
    "dpo": ("dpo", {}, PlainDpo),
    "dpo smoothed": (
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.3},
        lambda: PlainDpo(beta=0.5, epsilon=0.3),
    ),
    "dpo per token": (
        "dpo",
        {"beta": 2, "length_norm": True},
        lambda: PlainDpo(beta=2, length_norm=True),
    ),
    "r-dpo": ("r-dpo", {}, PlainRdpo),
    "r-dpo, all settings": (
        "r-dpo",
        {"beta": 1.5, "alpha": 0.2, "label_smoothing": 0.1, "length_norm": True},
        lambda: PlainRdpo(beta=1.5, alpha=0.2, epsilon=0.1, length_norm=True),
    ),
    "ipo": ("ipo", {}, PlainIpo),
    "ipo of sums": (
        "ipo",
        {"beta": 0.7, "length_norm": False},
        lambda: PlainIpo(beta=0.7, length_norm=False),
    ),
    "kto": ("kto", {}, PlainKto),
    "kto per token": (
        "kto",
        {"beta": 3.0, "length_norm": True},
        lambda: PlainKto(beta=3.0, length_norm=True),
    ),
    "cpo": ("cpo", {}, PlainCpo),
    "cpo, smoothed": ("cpo", {"label_smoothing": 0.2}, lambda: PlainCpo(smoothing=0.2)),
    "cpo per token": (
        "cpo",
        {"beta": 2.0, "alpha": 0.3, "length_norm": True},
        lambda: PlainCpo(beta=2.0, alpha=0.3, length_norm=True),
    ),
    "orpo": ("orpo", {}, PlainOrpo),
    "orpo, odds count more": ("orpo", {"alpha": 2.0}, lambda: PlainOrpo(beta=2.0)),
    "alphapo": ("alphapo", {}, PlainAlphaPo),
    "alphapo, all settings": (
        "alphapo",
        {"alpha": -0.5, "beta": 5, "gamma_beta_ratio": 0.3, "label_smoothing": 0.1},
        lambda: PlainAlphaPo(alpha=-0.5, beta=5, ratio=0.3, epsilon=0.1),
    ),
    "alphapo at 0": ("alphapo", {"alpha": 0}, PlainSimpo),
    "repo": ("repo", {}, PlainRepo),
    "repo, larger margin": ("repo", {"target_margin": 1.5}, lambda: PlainRepo(ratio=1.5)),
    "simper": ("simper", {}, PlainSimper),
    "sft": ("sft", {}, PlainSft),
    "sft of tokens": ("sft", {"nll": "tokens"}, lambda: PlainSft(tokens=True)),
    "cpo of tokens": ("cpo", {"nll": "tokens", "alpha": 2}, lambda: PlainCpoOfTokens(alpha=2)),
    "orpo of tokens": ("orpo", {"nll": "tokens"}, PlainOrpoOfTokens),
    "cpo-hinge": ("cpo-hinge", {}, PlainCpoHinge),
    "cpo-hinge, all settings": (
        "cpo-hinge",
        {"beta": 2.0, "alpha": 0.3, "length_norm": True},
        lambda: PlainCpoHinge(beta=2.0, alpha=0.3, length_norm=True),
    ),
    "cpo-ipo": ("cpo-ipo", {}, PlainCpoIpo),
    "cpo-ipo of sums": (
        "cpo-ipo",
        {"beta": 0.7, "alpha": 0.3, "length_norm": False},
        lambda: PlainCpoIpo(beta=0.7, alpha=0.3, length_norm=False),
    ),
    "bco": ("bco", {}, PlainBco),
    "bco per token": (
        "bco",
        {"beta": 2.0, "length_norm": True},
        lambda: PlainBco(beta=2.0, length_norm=True),
    ),
    "aot": ("aot", {}, PlainAot),
    "aot smoothed": (
        "aot",
        {"beta": 2.0, "label_smoothing": 0.2},
        lambda: PlainAot(beta=2.0, epsilon=0.2),
    ),
    "aot-unpaired": ("aot-unpaired", {}, PlainAotUnpaired),
    "aot-unpaired, all settings": (
        "aot-unpaired",
        {"beta": 2.0, "label_smoothing": 0.2, "length_norm": True},
        lambda: PlainAotUnpaired(beta=2.0, epsilon=0.2, length_norm=True),
    ),
    **{
        name: (name, given, partial(PlainRewards, formula=formula, epsilon=epsilon))
        for name, formula, epsilon, given in (
            ("dpo-hinge", plain.hinge, 0.0, {}),
            ("robust", plain.robust, 0.1, {"label_smoothing": 0.1}),
            ("exo", plain.exo, 1e-3, {}),
            ("nca-pair", plain.nca, 0.0, {}),
            ("bco-pair", plain.bco, 0.0, {}),
            ("sppo", plain.sppo, 0.0, {}),
            ("apo-zero", plain.apo_zero, 0.0, {}),
            ("apo-down", plain.apo_down, 0.0, {}),
            ("discopop", plain.discopop, 0.0, {}),
        )
    },
    "dpo-norm": ("dpo-norm", {}, partial(PlainRewards, formula=plain.logistic, length_norm=True)),
    **{
        f"{name}, larger beta": (
            name,
            {"beta": 1.5, "length_norm": True, **given},
            partial(PlainRewards, formula=formula, beta=1.5, epsilon=epsilon, length_norm=True),
        )
        for name, formula, epsilon, given in (
            ("robust", plain.robust, 0.3, {"label_smoothing": 0.3}),
            ("exo", plain.exo, 0.3, {"label_smoothing": 0.3}),
            ("nca-pair", plain.nca, 0.0, {}),
            ("bco-pair", plain.bco, 0.0, {}),
            ("sppo", plain.sppo, 0.0, {}),
            ("apo-zero", plain.apo_zero, 0.0, {}),
            ("apo-down", plain.apo_down, 0.0, {}),
            ("discopop", partial(plain.discopop, tau=0.5), 0.0, {"discopop_tau": 0.5}),
        )
    },
    **{
        f"{name} under {divergence}": (
            name,
            {"f_divergence_type": divergence, "beta": 0.5, **given},
            partial(kind, formula=formula, divergence=divergence, beta=0.5, **other),
        )
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
        for name, kind, formula, given, other in (
            ("dpo", PlainRewards, plain.logistic, {"label_smoothing": 0.1}, {"epsilon": 0.1}),
            ("dpo-norm", PlainRewards, plain.logistic, {}, {"length_norm": True}),
            ("ipo", PlainFIpo, plain.logistic, {}, {"length_norm": True}),
            ("exo", PlainRewards, plain.exo, {}, {"epsilon": 1e-3}),
        )
    },
    "alpha-divergence with another alpha": (
        "dpo-hinge",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
        partial(PlainRewards, formula=plain.hinge, divergence="alpha_divergence", coefficient=1.5),
    ),
    "alpha-divergence at 1": (
        "dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1},
        PlainDpo,
    ),
}
