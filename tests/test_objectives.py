"""Objectives against losses computed plainly, batch after batch with their state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preference_batches import (
    Pair,
    PlainGamma,
    PlainLmpo,
    gap,
    mean,
    nll,
    pack,
    random_pairs,
    rounded,
)
from widemargin.trainer.objectives import OBJECTIVES, build_objective

Margins = Callable[[Sequence[Pair], bool], list[float]]  # of a batch, in training or not
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
BATCHES = 20


def close(values: Sequence[float] | float, dtype: torch.dtype) -> Any:
    return pytest.approx(values, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])


def constant(margin: float) -> Margins:
    return lambda pairs, training: [margin] * len(pairs)


def smoothed(epsilon: float) -> Callable[[float], float]:
    return lambda x: (1 - epsilon) * nll(x) + epsilon * nll(-x)


def hinge(x: float) -> float:
    return max(0.0, 1 - x)


# name, hyperparameters, target margins of a batch, loss of gap minus margin
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], Margins], Callable[[float], float]]] = {
    "simpo": ("simpo", {}, lambda: constant(1.0), nll),
    "simpo smoothed": (
        "simpo",
        {"beta": 2.5, "gamma_beta_ratio": 0.55, "label_smoothing": 0.1},
        lambda: constant(2.5 * 0.55),
        smoothed(0.1),
    ),
    "sigmoid": ("sigmoid", {"beta": 10}, lambda: constant(5.0), nll),
    "hinge": ("hinge", {"beta": 3.0}, lambda: constant(1.5), hinge),
    "lmpo": ("lmpo", {}, lambda: PlainLmpo().margins, nll),
    "lmpo published": (
        "lmpo",
        {"zscore_bias_correction": False, "beta": 2.5, "gamma_beta_ratio": 0.8},
        lambda: PlainLmpo(beta=2.5, ratio=0.8, correct=False).margins,
        nll,
    ),
    "lmpo sigmoid": (
        "lmpo",
        {"margin_shape": "sigmoid", "margin_weight": 0.5, "zscore_decay": 0.5},
        lambda: PlainLmpo(shape="sigmoid", weight=0.5, decay=0.5).margins,
        nll,
    ),
    "lmpo log": (
        "lmpo",
        {"margin_shape": "log", "margin_length_norm": False},
        lambda: PlainLmpo(shape="log", length_norm=False).margins,
        nll,
    ),
    "lmpo cubic": ("lmpo", {"margin_power": 3}, lambda: PlainLmpo(power=3).margins, nll),
    "gamma-simpo": ("gamma-simpo", {}, lambda: PlainGamma().margins, nll),
    "gm-simpo": (
        "gm-simpo",
        {"beta": 10, "gamma_beta_ratio": 0.4, "tau": 1.0, "sampling_seed": 5},
        lambda: PlainGamma(beta=10, ratio=0.4, tau=1.0, seed=5).margins,
        nll,
    ),
    "gamma-simpo, small tau": (
        "gamma-simpo",
        {"tau": 0.2},
        lambda: PlainGamma(tau=0.2).margins,
        nll,
    ),
}


def batch_sizes(rng: np.random.Generator) -> list[int]:
    """Training (from step 1) begins with one pair; the 256 of a gamma-PO set are passed once."""
    sizes = rng.integers(1, 20, BATCHES).tolist()
    sizes[1], sizes[5], sizes[9] = 1, 1, 300
    return sizes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_twenty_batches_match_a_plain_computation(case, dtype):
    name, hyperparameters, plain, loss_of = CASES[case]
    objective, margins_of = build_objective(name, **hyperparameters), plain()
    beta = objective.hyperparameters.beta
    rng = np.random.default_rng(7)
    for step, size in enumerate(batch_sizes(rng)):
        training = step not in (0, 7, 15)
        pairs = rounded(random_pairs(rng, size), dtype)
        out = objective.train(training)(*pack(pairs, dtype))
        margins = margins_of(pairs, training)
        losses = [loss_of(gap(p, beta) - m) for p, m in zip(pairs, margins, strict=True)]
        assert out.losses.dtype == dtype
        assert out.target_margins.tolist() == close(margins, dtype)
        assert out.losses.tolist() == close(losses, dtype)
        assert out.loss.item() == close(mean(losses), dtype)
        rewards = [beta * mean(side) for pair in pairs for side in pair]
        assert out.chosen_rewards.tolist() == close(rewards[::2], dtype)
        assert out.rejected_rewards.tolist() == close(rewards[1::2], dtype)


def test_reports_sums_means_and_lengths():
    out = build_objective("simpo")(*pack([([-1.0, -2.0], [-4.0]), ([], [-1.0, -2.0, -3.0])]))
    assert out.chosen_sum_logps.tolist() == [-3, 0]
    assert out.rejected_sum_logps.tolist() == [-4, -6]
    assert out.chosen_mean_logps.tolist() == [-1.5, 0]
    assert out.rejected_mean_logps.tolist() == [-4, -2]
    assert out.chosen_lengths.tolist() == [2, 0]
    assert out.rejected_lengths.tolist() == [1, 3]
    assert out.real.tolist() == [True, True]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients(name):
    """Of the loss as it is with the margins held constant, which they are."""
    tokens, cu_seqlens = pack(random_pairs(np.random.default_rng(2), 4))
    objective = build_objective(name, sft_weight=0.3)
    out = objective(tokens, cu_seqlens)
    out.loss.backward()
    margins, beta = out.target_margins, objective.hyperparameters.beta
    assert not margins.requires_grad
    assert not out.chosen_rewards.requires_grad
    free = tokens.detach().requires_grad_()
    means = torch.stack([sequence.mean() for sequence in free.split(cu_seqlens.diff().tolist())])
    x = beta * (means[:4] - means[4:]) - margins
    losses = (1 - x).clamp(min=0) if name == "hinge" else -torch.nn.functional.logsigmoid(x)
    (losses - 0.3 * means[:4]).mean().backward()
    torch.testing.assert_close(tokens.grad, free.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    "pairs",
    [
        [([-0.5, -0.25], [-0.5, -0.25])] * 3,
        [([-0.5], [-0.7])],
        [([], [-0.7]), ([-0.1], [])],
        [([], [])],
        [([-900.0] * 4, [-1e-9]), ([-1e-9], [-900.0] * 4)],
        [([-0.0], [-0.0])] * 2,
    ],
    ids=["equal sides", "one pair", "empty completions", "nothing", "extremes", "certain"],
)
def test_awkward_batches_are_finite(name, pairs):
    objective = build_objective(name, sft_weight=0.1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for _ in range(3):
            tokens, cu_seqlens = pack(pairs, dtype)
            out = objective(tokens, cu_seqlens)
            out.loss.backward()
            assert out.losses.isfinite().all()
            assert out.target_margins.isfinite().all()
            assert tokens.grad is not None
            assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fillers_are_ignored(name):
    rng = np.random.default_rng(11)
    with_fillers, without = build_objective(name), build_objective(name)
    filler = random_pairs(rng, 2)
    for _ in range(4):
        pairs = random_pairs(rng, 3)
        mixed = [filler[0], *pairs, filler[1]]
        tokens, cu_seqlens = pack(mixed)
        out = with_fillers(tokens, cu_seqlens, pair_ids=torch.tensor([-1, 4, 5, 6, -1]))
        expected = without(*pack(pairs))
        out.loss.backward()
        for field in ("losses", "target_margins"):
            assert torch.equal(getattr(out, field)[1:4], getattr(expected, field))
            assert getattr(out, field)[[0, 4]].tolist() == [0, 0]
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-14)
        assert out.real.tolist() == [False, True, True, True, False]
        assert tokens.grad is not None
        first, last = len(filler[0][0]), len(filler[1][1])
        assert not tokens.grad[:first].any()
        assert not tokens.grad[-last:].any()
    before = with_fillers.state_dict()
    out = with_fillers(*pack(filler), pair_ids=torch.tensor([-1, -1]))
    out.loss.backward()
    assert out.loss.item() == 0
    after = with_fillers.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "generator" not in key)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 8), name=st.sampled_from([*OBJECTIVES]))
def test_order_of_pairs_changes_nothing(seed, count, name):
    rng = np.random.default_rng(seed)
    straight, shuffled = build_objective(name), build_objective(name)
    for _ in range(3):
        pairs, order = random_pairs(rng, count), rng.permutation(count)
        ids = torch.tensor(rng.choice(1000, count, replace=False))
        out = straight(*pack(pairs), pair_ids=ids)
        again = shuffled(*pack([pairs[i] for i in order]), pair_ids=ids[order])
        assert torch.equal(again.target_margins, out.target_margins[order])
        assert torch.equal(again.losses, out.losses[order])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from([*OBJECTIVES]))
def test_swapping_sides_negates_the_reward_margin(seed, name):
    pairs = random_pairs(np.random.default_rng(seed), 4)
    out = build_objective(name)(*pack(pairs))
    swapped = build_objective(name)(*pack([(rejected, chosen) for chosen, rejected in pairs]))
    margins = out.chosen_rewards - out.rejected_rewards
    assert torch.equal(swapped.chosen_rewards - swapped.rejected_rewards, -margins)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), beta=st.floats(0.1, 20), scale=st.floats(0.25, 4))
def test_scaling_logps_undoes_scaling_beta(seed, beta, scale):
    """Only beta times logps matters to SimPO, hinge and gamma-PO."""
    pairs = random_pairs(np.random.default_rng(seed), 4)
    tokens, cu_seqlens = pack(pairs)
    for name in ("simpo", "hinge", "gamma-simpo"):
        plain = {"beta": beta, "gamma_beta_ratio": 0.5}
        scaled = {"beta": beta / scale, "gamma_beta_ratio": 0.5 * scale}
        out = build_objective(name, **plain)(tokens, cu_seqlens)
        again = build_objective(name, **scaled)(tokens * scale, cu_seqlens)
        torch.testing.assert_close(again.losses, out.losses, rtol=1e-10, atol=1e-12)


def test_a_bad_pair_leaves_the_others_and_the_statistics_alone():
    rng = np.random.default_rng(4)
    for name in OBJECTIVES:
        objective, clean = build_objective(name), build_objective(name)
        pairs = random_pairs(rng, 4)
        bad = ([math.nan], [-1.0])
        tokens, cu_seqlens = pack([*pairs[:2], bad, *pairs[2:]])
        out = objective(tokens, cu_seqlens)
        expected = clean(*pack(pairs))
        others = [0, 1, 3, 4]
        assert torch.equal(out.losses[others], expected.losses)
        assert out.losses[2].isnan()
        if name == "gamma-simpo":
            assert out.target_margins[2] == 1.0
        state, clean_state = objective.state_dict(), clean.state_dict()
        assert all(torch.equal(state[key], clean_state[key]) for key in state)


def test_first_step_of_lmpo():
    """Corrected, the first z-scores have mean 0 and deviation 1; published, they are far larger."""
    pairs = random_pairs(np.random.default_rng(5), 16)
    options = {"margin_weight": 1.0, "gamma_beta_ratio": 0.0}
    corrected = build_objective("lmpo", **options)(*pack(pairs)).target_margins
    assert corrected.mean().item() == pytest.approx(0, abs=1e-6)
    assert corrected.std().item() == pytest.approx(1, rel=1e-4)
    published = build_objective("lmpo", **options, zscore_bias_correction=False)
    assert published(*pack(pairs)).target_margins.std().item() == pytest.approx(10, rel=1e-3)


def test_lmpo_has_no_zscore_before_a_deviation():
    pair = random_pairs(np.random.default_rng(6), 1)
    for correct in (True, False):
        objective = build_objective("lmpo", zscore_bias_correction=correct)
        assert objective.eval()(*pack(pair)).target_margins.tolist() == [1.0]
        assert objective.train()(*pack(pair)).target_margins.tolist() == [1.0]
        state = objective.state_dict()
        assert state["lmpo.mean_steps"] == 1
        assert state["lmpo.std_steps"] == 0


def test_gamma_margins_average_to_gamma_and_favour_large_gaps():
    pairs = random_pairs(np.random.default_rng(8), 300)
    out = build_objective("gamma-simpo", tau=1.0)(*pack(pairs))
    assert out.target_margins.mean().item() == pytest.approx(1.0, rel=1e-12)
    order = (out.chosen_rewards - out.rejected_rewards).argsort()
    assert (out.target_margins[order].diff() >= 0).all()
    assert out.target_margins.std() > 1e-3


def test_gamma_queue_keeps_the_last_2048():
    rng = np.random.default_rng(9)
    objective = build_objective("gamma-simpo", beta=1.0)
    gaps: list[float] = []
    for size in (2000, 100, 3, 2500, 2048, 7):
        pairs = random_pairs(rng, size, longest=1)
        objective(*pack(pairs))
        gaps += [gap(pair, 1.0) for pair in pairs]
        state = objective.state_dict()
        kept = min(len(gaps), 2048)
        assert state["gamma-simpo.fill"] == kept
        expected = [0.0] * 2048
        for place in range(len(gaps) - kept, len(gaps)):
            expected[place % 2048] = gaps[place]
        assert state["gamma-simpo.queue"].tolist() == expected
        assert state["gamma-simpo.head"] == len(gaps) % 2048
