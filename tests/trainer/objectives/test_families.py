"""What is particular to one objective or family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from widemargin.trainer.objectives import build_objective
from widemargin.trainer.objectives.gather import gather_pairs
from widemargin.trainer.objectives.losses.beta_po import largest_keys

from tests.support.preference_batches import Pair, gap, pack, random_pairs, reference_sums


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


def test_beta_follows_the_drawn_gaps():
    """Gaps of 0.5, all alike: beta doubles at tau 2 and sinks as the running mean nears them."""
    pairs = [([-0.5], [-0.75])] * 10
    objective = build_objective("beta-simpo", tau=2.0, gamma_beta_ratio=1.0)
    used = [objective(*pack(pairs)).target_margins[0].item() for _ in range(3)]
    assert used == pytest.approx([4.0, 3.8, 3.62])


@pytest.mark.parametrize("name", ["beta-simpo", "beta-dpo"])
@pytest.mark.parametrize(("pairs", "drawn"), [(1, 1), (2, 1), (5, 4), (35, 28), (300, 240)])
def test_four_fifths_are_drawn_and_stand_for_all(name, pairs, drawn):
    batch = random_pairs(np.random.default_rng(pairs), pairs)
    tokens, cu_seqlens = pack(batch)
    out = build_objective(name)(tokens, cu_seqlens, reference_sums(batch))
    sampled = out.losses > 0
    assert sampled.sum() == drawn
    out.loss.backward()
    assert tokens.grad is not None
    used = [grad.abs().sum() > 0 for grad in tokens.grad.split(cu_seqlens.diff().tolist())]
    assert used == sampled.tolist() * 2
    # Their own mean, not that of all pairs: what one of them would lose alone, undiluted.
    alone = build_objective(name, tau=0.0, sample_fraction=1.0).eval()
    plain = build_objective(name, tau=0.0)(*pack(batch), reference_sums(batch))
    losses = alone(*pack(batch), reference_sums(batch)).losses
    assert plain.loss.item() == pytest.approx(losses[plain.losses > 0].mean().item(), rel=1e-12)


def test_draws_have_the_probabilities_of_drawing_one_after_the_other():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    pairs = gather_pairs(torch.zeros(5, 1), torch.tensor([0, 1, -1, 2, 3]), None, None)
    log_weights = torch.cat([weights, torch.ones(1)]).log()
    generator = torch.Generator().manual_seed(0)
    trials, counts = 4000, torch.zeros(5)
    for _ in range(trials):
        uniform = torch.rand(2048, generator=generator, dtype=torch.float64)
        counts += largest_keys(log_weights, uniform, pairs, torch.tensor(2))
    share = weights / weights.sum()
    second = torch.stack([share[j] * share / (1 - share[j]) for j in range(4)])
    expected = share + second.fill_diagonal_(0).sum(0)
    assert counts[4] == 0  # the filler
    assert counts.sum() == 2 * trials
    assert (counts[:4] / trials - expected).abs().max() < 0.03  # four deviations


def test_outliers_are_seldom_drawn():
    """A gap 40 deviations from the mean has a weight that underflows; the others stay usable."""
    pairs = [*random_pairs(np.random.default_rng(0), 9), ([-0.1], [-20.0])]
    objective = build_objective("beta-simpo")
    for _ in range(20):
        assert objective(*pack(pairs)).losses[-1] == 0


def test_kto_baselines_are_means_over_the_batch_and_never_negative():
    pairs: list[Pair] = [([-1.0], [-3.0]), ([-2.0], [-2.0])]
    reference = torch.tensor([-2.0, -4.0, -1.0, -1.0], dtype=torch.float64)
    # rho: chosen 1 and 2, rejected -2 and -1, so the baselines are 1.5 and 0.
    out = build_objective("kto", beta=1.0)(*pack(pairs), reference)
    x = torch.tensor([[1.0, 3.5], [2.0, 2.5]], dtype=torch.float64)
    torch.testing.assert_close(out.losses, (1 - x.sigmoid()).mean(1), rtol=1e-12, atol=0)


def test_orpo_keeps_its_precision_where_an_answer_is_certain():
    """The odds of exp(-1e-9) are 1e9; computed from p, which is 1 in fp32, they are infinite."""
    pairs: list[Pair] = [([-1e-5], [-0.7]), ([-1e-5], [-1e-4]), ([-0.7], [-60.0])]
    out = build_objective("orpo", alpha=1.0)(*pack(pairs, torch.float32))
    exact = build_objective("orpo", alpha=1.0)(*pack(pairs))
    assert out.losses.tolist() == pytest.approx(exact.losses.tolist(), rel=1e-5)
    assert exact.losses[1].item() == pytest.approx(1e-5 + np.log(1.1), rel=1e-4)
    assert exact.losses[2].item() == pytest.approx(0.7, rel=1e-9)
