"""The table of objectives: names, hyperparameters that matter, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import (
    ALIASES,
    OBJECTIVES,
    build_objective,
    canonical_name,
    hyperparameters_of,
)

from tests.support.objective_cases import OF_PAIRS
from tests.support.preference_batches import called, pack, random_pairs


def test_names():
    assert set(OBJECTIVES) == {
        *("simpo", "hinge", "lmpo", "gamma-simpo", "gamma-dpo", "beta-simpo", "beta-dpo"),
        *("dpo", "r-dpo", "ipo", "kto", "cpo", "orpo", "cpo-hinge", "cpo-ipo"),
        *("alphapo", "repo", "simper", "sft", "dpo-hinge", "dpo-norm", "robust", "exo", "nca-pair"),
        *("bco", "bco-pair", "sppo", "apo-zero", "apo-down", "discopop", "aot", "aot-unpaired"),
        *("infonca", "nca", "plackett-luce", "lipo", "rrhf", "pro", "apo-zero-unpaired"),
    }
    published = {"gm-simpo": "gamma-simpo", "gm-dpo": "gamma-dpo"}
    published |= {"b-simpo": "beta-simpo", "b-dpo": "beta-dpo", "sigmoid": "simpo"}
    trl = {"exo_pair": "exo", "nca_pair": "nca-pair", "bco_pair": "bco-pair", "sppo_hard": "sppo"}
    trl |= {"aot_unpaired": "aot-unpaired", "apo_zero": "apo-zero", "apo_down": "apo-down"}
    trl |= {"apo_zero_unpaired": "apo-zero-unpaired"}
    assert published | trl | {"sigmoid_norm": "dpo-norm"} == ALIASES
    for alias, name in ALIASES.items():
        assert alias not in OBJECTIVES
        assert build_objective(alias).name == canonical_name(alias) == name


WITH_MARGIN = ["simpo", "hinge", "alphapo", "lmpo", "gamma-simpo", "gamma-dpo", "beta-simpo"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_hyperparameters_are_documented(name):
    fields = hyperparameters_of(name)
    assert "sft_weight" in fields
    assert ("beta" in fields) == (name not in ("orpo", "repo", "simper", "sft", "rrhf"))
    assert ("gamma_beta_ratio" in fields) == (name in WITH_MARGIN)
    assert "length_norm" in fields or not OBJECTIVES[name].needs_reference
    assert all(field.metadata["help"] for field in fields.values())
    assert build_objective(name).hyperparameters == OBJECTIVES[name].hyperparameters()


OTHER_VALUES = {
    "beta": 3.0,
    "gamma_beta_ratio": 0.25,
    "sft_weight": 0.5,
    "label_smoothing": 0.2,
    "margin_weight": 0.5,
    "margin_shape": "log",
    "margin_power": 3,
    "margin_length_norm": False,
    "zscore_decay": 0.5,
    "zscore_bias_correction": False,
    "tau": 1.0,
    "sampling_seed": 1,
    "sample_fraction": 0.5,
    "gap_decay": 0.5,
    "alpha": 0.5,
    "target_margin": 0.2,
    "discopop_tau": 0.5,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.2,
    "nll": "tokens",
    "ld_alpha": 0.3,
    "desirable_weight": 2.0,
    "undesirable_weight": 0.5,
}
BESIDE: dict[str, dict[str, Any]] = {
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "nll": {"sft_weight": 0.5},
}
"""What must be given for a hyperparameter to have a meaning."""


@pytest.mark.parametrize(("name", "key"), [(n, k) for n in OF_PAIRS for k in hyperparameters_of(n)])
def test_every_hyperparameter_matters(name, key):
    if key == "kl_estimate":
        pytest.skip("of single answers, see test_labels")
    if key == "use_weighting" and name.startswith("aot"):
        pytest.skip("refused, see below")
    usual = build_objective(name, **BESIDE.get(key, {}))
    value = OTHER_VALUES[key] if key in OTHER_VALUES else not getattr(usual.hyperparameters, key)
    changed = build_objective(name, **BESIDE.get(key, {}), **{key: value})
    for size in (300, 4):
        batch = called(random_pairs(np.random.default_rng(size), size))
        squares = torch.full_like(batch[0].detach(), -1.0)
        losses, others = (each(*batch, log_sum_squares=squares).losses for each in (usual, changed))
    assert not torch.equal(losses, others)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        (
            "simp0",
            {},
            "objective 'simp0' is not known; did you mean 'simpo'.*import.*lmpo.*gm-simpo",
        ),
        ("", {}, "not known"),
        ("simpo", {"betta": 1}, "hyperparameter of simpo 'betta'.*mean 'beta'.*label_smoothing"),
        ("lmpo", {"label_smoothing": 0.1}, "hyperparameter of lmpo"),
        ("simpo", {"beta": 0}, r"beta \(scale of the rewards\): expected a number > 0, got 0"),
        ("simpo", {"beta": -1.0}, "beta"),
        ("simpo", {"beta": float("nan")}, "beta"),
        ("simpo", {"beta": float("inf")}, "beta"),
        ("simpo", {"beta": True}, "beta"),
        ("simpo", {"beta": "2"}, "got '2'"),
        ("simpo", {"label_smoothing": 0.6}, ">= 0 and <= 0.5"),
        ("hinge", {"gamma_beta_ratio": -0.1}, "gamma_beta_ratio"),
        ("hinge", {"sft_weight": -1}, "sft_weight"),
        ("lmpo", {"margin_shape": "cubic"}, "one of power, sigmoid, log"),
        ("lmpo", {"margin_power": 4}, "odd"),
        ("lmpo", {"margin_power": 3.0}, "margin_power"),
        ("lmpo", {"zscore_decay": 1.0}, ">= 0 and < 1"),
        ("lmpo", {"zscore_bias_correction": 1}, "true or false"),
        ("gamma-simpo", {"tau": 0}, "tau"),
        ("dpo", {"gamma_beta_ratio": 0.5}, "hyperparameter of dpo 'gamma_beta_ratio' is not known"),
        ("kto", {"gamma_beta_ratio": 0.5}, "hyperparameter of kto 'gamma_beta_ratio'"),
        ("beta-dpo", {"gamma_beta_ratio": 0.5}, "hyperparameter of beta-dpo"),
        ("ipo", {"label_smoothing": 0.1}, "hyperparameter of ipo"),
        ("orpo", {"beta": 0.1}, "hyperparameter of orpo 'beta' is not known.*alpha"),
        ("orpo", {"alpha": 0}, "alpha"),
        ("b-dpo", {"sample_fraction": 0.0}, "> 0 and <= 1"),
        ("b-dpo", {"gap_decay": 1}, "gap_decay"),
        ("dpo", {"length_norm": 1}, "true or false"),
        ("gamma-simpo", {"sampling_seed": -1}, "a whole number >= 0"),
        ("aot", {"use_weighting": True}, "use_weighting: leave it out; aot sorts answers"),
        ("dpo + aot", {"use_weighting": True}, "use_weighting: leave it out"),
        ("dpo", {"ld_alpha": 1.1}, ">= 0 and <= 1"),
        ("simpo", {"nll": "tokens"}, "nll: set sft_weight above 0"),
        ("dpo", {"nll": "prompt_and_answer"}, "nll: set sft_weight above 0"),
        ("dpo", {"f_alpha_divergence_coef": 0.2}, "set f_divergence_type: alpha_divergence"),
        ("dpo", {"f_divergence_type": "kl"}, "one of reverse_kl, forward_kl"),
        ("kto", {"f_divergence_type": "forward_kl"}, "hyperparameter of kto"),
        ("robust", {"label_smoothing": 0.5}, "< 0.5"),
        ("exo", {"label_smoothing": 0.0}, "> 0"),
        ("dpo + simpo", {"beta": -1.0}, "a number > 0"),
        ("dpo + ipo", {"length_norm": 3}, "true or false"),
        ("dpo + sft", {"gamma_beta_ratio": 1.0}, r"hyperparameter of dpo \+ sft"),
        ("dpo + ddpo", {}, "objective 'ddpo' is not known; did you mean 'dpo'"),
        ("dpo + dpo", {}, "name each part once"),
        ("0*dpo + sft", {}, "give dpo a weight above 0, got '0'"),
        ("dpo + x*sft", {}, "give sft a weight above 0, got 'x'"),
    ],
)
def test_errors_say_what_is_expected(name, hyperparameters, message):
    with pytest.raises(UserError, match=message) as caught:
        build_objective(name, **hyperparameters)
    assert "\n" not in str(caught.value)


def test_calls_check_shapes():
    objective = build_objective("simpo")
    tokens, cu_seqlens = pack(random_pairs(np.random.default_rng(0), 3))
    with pytest.raises(UserError, match=r"pair_ids: expected shape \[3\]"):
        objective(tokens, cu_seqlens, pair_ids=torch.arange(6))
    with pytest.raises(UserError, match=r"reference: expected shape \[6\]"):
        objective(tokens, cu_seqlens, reference=torch.zeros(3))
    with pytest.raises(ValueError, match="cu_seqlens"):
        objective(tokens, cu_seqlens[:-1])
    assert objective(tokens, cu_seqlens, reference=torch.zeros(6)).loss.isfinite()
    for name, spec in OBJECTIVES.items():
        if spec.needs_reference and spec.takes != ("labelled",):
            with pytest.raises(UserError, match=f"reference: {name} needs the frozen model's"):
                build_objective(name)(tokens, cu_seqlens)
