"""Settings that look at single tokens: LD-DPO's weights of long tails, WPO's of whole pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import build_objective

from tests.support.preference_batches import (
    mean,
    nll,
    pack,
    random_pairs,
    reference_sums,
    references,
)

PAIRS = [*random_pairs(np.random.default_rng(0), 12), ([-0.5] * 9, [-0.25]), ([], [-1.0, -0.5])]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_tokens_past_the_shorter_answer_count_less(alpha):
    """In sums, of the objective and of its reference; not in means or likelihoods."""
    objective = build_objective("dpo", beta=0.7, ld_alpha=alpha)
    out = objective(*pack(PAIRS), reference_sums(PAIRS))
    weighted = []
    for pair in PAIRS:
        shared = min(map(len, pair))
        weighted.append([math.fsum(y[:shared]) + alpha * math.fsum(y[shared:]) for y in pair])
    expected = [
        nll(0.7 * (w - ref_w - (lost - ref_l)))
        for (w, lost), (ref_w, ref_l) in zip(weighted, references(PAIRS), strict=True)
    ]
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-9)
    assert out.chosen_sum_logps.tolist() == pytest.approx([w for w, _ in weighted], rel=1e-9)
    assert out.chosen_mean_logps.tolist() == pytest.approx([mean(pair[0]) for pair in PAIRS])
    sums = objective.sequence_sums(*pack(PAIRS))
    both = [w for w, _ in weighted] + [lost for _, lost in weighted]
    assert sums.tolist() == pytest.approx(both, rel=1e-9)


def test_tokens_that_are_padding_change_nothing():
    tokens, cu_seqlens = pack(PAIRS)
    longer = torch.cat([tokens, torch.tensor([-3.0, -4.0])])
    objective = build_objective("dpo", ld_alpha=0.3)
    reference = reference_sums(PAIRS)
    out, again = (objective(each, cu_seqlens, reference) for each in (tokens, longer))
    assert torch.equal(out.losses, again.losses)


def test_pairs_weigh_what_the_policy_would_write():
    rng = np.random.default_rng(1)
    tokens, cu_seqlens = pack(PAIRS)
    squares = torch.from_numpy(-rng.random(len(tokens)))
    given = {"beta": 0.7, "sft_weight": 0.3}
    plain = build_objective("dpo", **given | {"sft_weight": 0.0})
    weighted = build_objective("dpo", **given, use_weighting=True)
    reference = reference_sums(PAIRS)
    losses = plain(tokens, cu_seqlens, reference).losses.tolist()
    out = weighted(tokens, cu_seqlens, reference, log_sum_squares=squares)
    parts = (tokens.detach() - squares).split(cu_seqlens.diff().tolist())
    means = [mean(part.tolist()) for part in parts]
    expected = [
        math.exp(means[i] + means[i + len(PAIRS)]) * loss - 0.3 * mean(PAIRS[i][0])
        for i, loss in enumerate(losses)
    ]
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UserError, match="log_sum_squares: give it"):
        weighted(tokens, cu_seqlens, reference)
