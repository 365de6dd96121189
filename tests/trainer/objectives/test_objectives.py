"""Objectives against losses computed plainly, batch after batch with their state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from widemargin.trainer.objectives import OBJECTIVES, build_objective, canonical_name

from tests.support.objective_cases import CASES, OF_PAIRS
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


def check_close(values: torch.Tensor, expected: Sequence[float] | float) -> None:
    tolerance = TOLERANCE[values.dtype]
    wanted = torch.tensor(expected, dtype=values.dtype)
    torch.testing.assert_close(values.detach(), wanted, rtol=tolerance, atol=tolerance)


UNCOUPLED = [name for name in OF_PAIRS if not OBJECTIVES[name].couples_pairs]


def test_every_objective_has_a_case():
    assert {canonical_name(name) for name, _, _ in CASES.values()} == set(OF_PAIRS)


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
        check_close(out.target_margins, margins)
        check_close(out.losses, losses)
        check_close(out.loss, mean(losses))
        check_close(out.chosen_rewards, chosen)
        check_close(out.rejected_rewards, rejected)


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

    average = mean([len(pair[0]) for pair in pairs])

    def of_chosen(pair: Pair) -> float:
        counted = average if hyperparameters.get("nll") == "tokens" else len(pair[0])
        return -math.fsum(pair[0]) / counted

    def loss(pair: Pair, i: int) -> float:
        own = getattr(plain, "differentiated", plain.loss)(pair, batch[i][1], constants[i])
        return (own + 0.3 * of_chosen(pair)) / len(pairs)

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


@pytest.mark.parametrize("name", UNCOUPLED)
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
