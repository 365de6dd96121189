"""What holds for every objective: finite numbers, no fillers, no order, the symmetries of each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.kernels.margin_loss.function import sequence_logps
from widemargin.trainer.objectives import OBJECTIVES, build_objective

from tests.support.objective_cases import MIXTURE, OF_PAIRS
from tests.support.preference_batches import pack, random_pairs, reference_sums

TRAINED = [*OF_PAIRS, MIXTURE]
WITH_REFERENCE = [name for name in OF_PAIRS if OBJECTIVES[name].needs_reference]


@pytest.mark.parametrize("name", TRAINED)
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
            out = objective(tokens, cu_seqlens, reference_sums(pairs))
            out.loss.backward()
            assert out.losses.isfinite().all()
            assert out.target_margins.isfinite().all()
            assert tokens.grad is not None
            assert tokens.grad.isfinite().all()


@pytest.mark.parametrize("name", TRAINED)
def test_fillers_are_ignored(name):
    rng = np.random.default_rng(11)
    with_fillers, without = build_objective(name), build_objective(name)
    filler = random_pairs(rng, 2)
    for _ in range(4):
        pairs = random_pairs(rng, 3)
        mixed = [filler[0], *pairs, filler[1]]
        tokens, cu_seqlens = pack(mixed)
        ids = torch.tensor([-1, 4, 5, 6, -1])
        out = with_fillers(tokens, cu_seqlens, reference_sums(mixed), pair_ids=ids)
        expected = without(*pack(pairs), reference_sums(pairs))
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
    out = with_fillers(*pack(filler), reference_sums(filler), pair_ids=torch.tensor([-1, -1]))
    out.loss.backward()
    assert out.loss.item() == 0
    after = with_fillers.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "generator" not in key)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_a_filler_cannot_spoil_a_batch(name):
    """Even where the reference has nothing for it."""
    pairs = random_pairs(np.random.default_rng(12), 3)
    tokens, cu_seqlens = pack(pairs)
    reference = reference_sums(pairs)
    reference[[2, 5]] = math.nan
    for training in (True, False):
        objective = build_objective(name).train(training)
        out = objective(tokens, cu_seqlens, reference, pair_ids=torch.tensor([0, 1, -1]))
        (gradient,) = torch.autograd.grad(out.loss, tokens)
        assert out.losses[:2].isfinite().all()
        assert out.losses[2] == 0
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("training", [True, False])
def test_no_pairs_at_all(name, training):
    objective = build_objective(name, sft_weight=0.1).train(training)
    tokens, cu_seqlens = pack([])
    out = objective(tokens, cu_seqlens, reference=torch.zeros(0))
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.losses.shape == (0,)
    pairs = random_pairs(np.random.default_rng(13), 3)
    assert objective(*pack(pairs), reference_sums(pairs)).losses.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 8), name=st.sampled_from(TRAINED))
def test_order_of_pairs_changes_nothing(seed, count, name):
    rng = np.random.default_rng(seed)
    straight, shuffled = build_objective(name), build_objective(name)
    for _ in range(3):
        pairs, order = random_pairs(rng, count), rng.permutation(count)
        ids = torch.tensor(rng.choice(1000, count, replace=False))
        out = straight(*pack(pairs), reference_sums(pairs), pair_ids=ids)
        mixed = [pairs[i] for i in order]
        again = shuffled(*pack(mixed), reference_sums(mixed), pair_ids=ids[order])
        assert torch.equal(again.target_margins, out.target_margins[order])
        assert torch.equal(again.losses, out.losses[order])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(TRAINED))
def test_swapping_sides_negates_the_reward_margin(seed, name):
    pairs = random_pairs(np.random.default_rng(seed), 4)
    turned = [(rejected, chosen) for chosen, rejected in pairs]
    out = build_objective(name)(*pack(pairs), reference_sums(pairs))
    swapped = build_objective(name)(*pack(turned), reference_sums(turned))
    margins = out.chosen_rewards - out.rejected_rewards
    assert torch.equal(swapped.chosen_rewards - swapped.rejected_rewards, -margins)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), beta=st.floats(0.1, 20), scale=st.floats(0.25, 4))
def test_scaling_logps_undoes_scaling_beta(seed, beta, scale):
    """Only beta times logps matters, where there is no likelihood term and no least beta."""
    pairs = random_pairs(np.random.default_rng(seed), 4)
    tokens, cu_seqlens = pack(pairs)
    reference = reference_sums(pairs)
    margins = ("simpo", "hinge", "gamma-simpo", "gamma-dpo")
    for name in (*margins, "dpo", "r-dpo", "kto"):
        plain, scaled = {"beta": beta}, {"beta": beta / scale}
        if name in margins:
            plain["gamma_beta_ratio"], scaled["gamma_beta_ratio"] = 0.5, 0.5 * scale
        out = build_objective(name, **plain)(tokens, cu_seqlens, reference)
        again = build_objective(name, **scaled)(tokens * scale, cu_seqlens, reference * scale)
        torch.testing.assert_close(again.losses, out.losses, rtol=1e-10, atol=1e-12)


ONLY_RATIOS = [name for name in WITH_REFERENCE if name != "aot"]  # it sorts both models alone


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(ONLY_RATIOS))
def test_only_the_difference_to_the_reference_matters(seed, name):
    """Completions that become more likely under both models have the losses they had."""
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng, 5)
    tokens, cu_seqlens = pack(pairs)
    reference, shifts = reference_sums(pairs), torch.from_numpy(rng.normal(size=10))
    shifted = tokens.detach().clone()
    shifted[cu_seqlens[:-1].long()] += shifts
    out = build_objective(name)(tokens, cu_seqlens, reference)
    again = build_objective(name)(shifted, cu_seqlens, reference + shifts)
    torch.testing.assert_close(again.losses, out.losses, rtol=1e-9, atol=1e-10)


AT_THE_REFERENCE = {
    "dpo": math.log(2),
    "gamma-dpo": math.log(2),  # equal gaps: every gamma_i is g
    "beta-dpo": math.log(2),
    "r-dpo": math.log(2),  # for equal lengths
    "ipo": 25.0,  # 1 / (2 beta), squared
    "kto": 0.5,
    "dpo-hinge": 1.0,
    "dpo-norm": math.log(2),
    "robust": math.log(2),
    "exo": (math.log(0.5 / 0.999) + math.log(0.5 / 0.001)) / 2,
    "nca-pair": 2 * math.log(2),
    "bco-pair": 2 * math.log(2),
    "sppo": 50.0,  # twice 1 / (2 beta), squared
    "apo-zero": 1.0,
    "apo-down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
    "bco": 2 * math.log(2),
    "aot": math.log(2),
    "aot-unpaired": math.log(2),
}


@pytest.mark.parametrize("name", WITH_REFERENCE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_policy_equal_to_the_reference(name, dtype):
    pairs = [(chosen, chosen[::-1]) for chosen, _ in random_pairs(np.random.default_rng(14), 20)]
    tokens, cu_seqlens = pack(pairs, dtype)
    sums, _ = sequence_logps(tokens, cu_seqlens)
    out = build_objective(name)(tokens, cu_seqlens, sums)
    assert not out.chosen_rewards.any()
    assert not out.rejected_rewards.any()
    assert out.loss.item() == pytest.approx(AT_THE_REFERENCE[name], rel=1e-6)
    if name in ("dpo", "r-dpo"):
        assert out.losses.tolist() == pytest.approx([math.log(2)] * 20, rel=1e-6)


def test_a_bad_pair_leaves_the_others_and_the_statistics_alone():
    rng = np.random.default_rng(4)
    for name in TRAINED:
        objective, clean = build_objective(name), build_objective(name)
        pairs = random_pairs(rng, 4)
        bad = ([math.nan], [-1.0])
        mixed = [*pairs[:2], bad, *pairs[2:]]
        out = objective(*pack(mixed), reference_sums(mixed))
        expected = clean(*pack(pairs), reference_sums(pairs))
        others = [0, 1, 3, 4]
        assert torch.equal(out.losses[others], expected.losses)
        assert out.losses[2].isnan()
        if name == "gamma-simpo":
            assert out.target_margins[2] == 1.0
        state, clean_state = objective.state_dict(), clean.state_dict()
        assert all(torch.equal(state[key], clean_state[key]) for key in state)
