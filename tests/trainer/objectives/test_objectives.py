"""Objectives against losses computed plainly, batch after batch with their state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from widemargin.trainer.objectives import OBJECTIVES, build_objective, canonical_name

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
from tests.support.preference_batches import (
    Pair,
    mean,
    pack,
    random_pairs,
    reference_sums,
    references,
    rounded,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
BATCHES = 20


def close(values: Sequence[float] | float, dtype: torch.dtype) -> Any:
    return pytest.approx(values, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


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
    "cpo per token": (
        "cpo",
        {"beta": 2.0, "alpha": 0.3, "length_norm": True},
        lambda: PlainCpo(beta=2.0, alpha=0.3, length_norm=True),
    ),
    "orpo": ("orpo", {}, PlainOrpo),
    "orpo, odds count more": ("orpo", {"alpha": 2.0}, lambda: PlainOrpo(beta=2.0)),
}


def test_every_objective_has_a_case():
    assert {canonical_name(name) for name, _, _ in CASES.values()} == set(OBJECTIVES)


def batch_sizes(rng: np.random.Generator) -> list[int]:
    """Training (from step 1) begins with one pair; the 256 of a gamma-PO set are passed once."""
    sizes = rng.integers(1, 20, BATCHES).tolist()
    sizes[1], sizes[5], sizes[9] = 1, 1, 300
    return sizes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_twenty_batches_match_a_plain_computation(case, dtype):
    name, hyperparameters, plain = CASES[case]
    objective, plain = build_objective(name, **hyperparameters), plain()
    rng = np.random.default_rng(7)
    for step, size in enumerate(batch_sizes(rng)):
        training = step not in (0, 7, 15)
        pairs = rounded(random_pairs(rng, size), dtype)
        out = objective.train(training)(*pack(pairs, dtype), reference_sums(pairs, dtype))
        batch = list(zip(pairs, references(pairs), strict=True))
        constants = plain.constants(batch, training)
        losses = [plain.loss(*item, c) for item, c in zip(batch, constants, strict=True)]
        margins = [plain.margin(c) for c in constants]
        chosen, rejected = zip(*(plain.rewards(*item) for item in batch), strict=True)
        assert out.losses.dtype == out.target_margins.dtype == out.chosen_rewards.dtype == dtype
        assert out.target_margins.tolist() == close(margins, dtype)
        assert out.losses.tolist() == close(losses, dtype)
        assert out.loss.item() == close(mean(losses), dtype)
        assert out.chosen_rewards.tolist() == close(chosen, dtype)
        assert out.rejected_rewards.tolist() == close(rejected, dtype)


def moved(pair: Pair, side: int, token: int, step: float) -> Pair:
    """The pair with one token's logp changed."""
    copy = (list(pair[0]), list(pair[1]))
    copy[side][token] += step
    return copy


@pytest.mark.parametrize("case", CASES)
def test_gradients_match_differences_of_the_plain_loss(case):
    """With what is held constant kept, on the second batch, when every state is in use."""
    name, hyperparameters, plain = CASES[case]
    objective, plain = build_objective(name, sft_weight=0.3, **hyperparameters), plain()
    rng = np.random.default_rng(2)
    warm_up, pairs = random_pairs(rng, 30), random_pairs(rng, 5)
    plain.constants(list(zip(warm_up, references(warm_up), strict=True)), True)
    objective(*pack(warm_up), reference_sums(warm_up))
    batch = list(zip(pairs, references(pairs), strict=True))
    constants = plain.constants(batch, True)

    def loss(pair: Pair, i: int) -> float:
        return (plain.loss(pair, batch[i][1], constants[i]) - 0.3 * mean(pair[0])) / len(pairs)

    h, expected = 1e-5, []
    for side in (0, 1):
        for i, pair in enumerate(pairs):
            for token in range(len(pair[side])):
                up, down = (loss(moved(pair, side, token, x), i) for x in (h, -h))
                expected.append((up - down) / (2 * h))
    tokens, cu_seqlens = pack(pairs)
    out = objective(tokens, cu_seqlens, reference_sums(pairs))
    out.loss.backward()
    assert tokens.grad is not None
    assert tokens.grad.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for detached in (out.target_margins, out.chosen_rewards, out.rejected_rewards):
        assert not detached.requires_grad


@pytest.mark.parametrize("name", ["simpo", "hinge", "dpo", "r-dpo", "ipo", "cpo", "orpo"])
def test_gradcheck(name):
    """Where nothing is held constant; the others have the test above."""
    pairs = random_pairs(np.random.default_rng(3), 3, longest=4)
    tokens, cu_seqlens = pack(pairs)
    objective = build_objective(name, sft_weight=0.2)

    def losses(tokens):
        return objective(tokens, cu_seqlens, reference_sums(pairs)).losses

    assert torch.autograd.gradcheck(losses, tokens)


def test_reports_sums_means_and_lengths():
    out = build_objective("simpo")(*pack([([-1.0, -2.0], [-4.0]), ([], [-1.0, -2.0, -3.0])]))
    assert out.chosen_sum_logps.tolist() == [-3, 0]
    assert out.rejected_sum_logps.tolist() == [-4, -6]
    assert out.chosen_mean_logps.tolist() == [-1.5, 0]
    assert out.rejected_mean_logps.tolist() == [-4, -2]
    assert out.chosen_lengths.tolist() == [2, 0]
    assert out.rejected_lengths.tolist() == [1, 3]
    assert out.real.tolist() == [True, True]
