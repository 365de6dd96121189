"""The batch planner: exact steps, balance, what depends on ranks and what does not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.batching.planner import Plan, Planner, deal, even_shares
from widemargin.trainer.data.table import PairLengths
from widemargin.trainer.errors import UserError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "judged_pairs_train.jsonl.gz"


def lengths_of(*pairs: tuple[int, int, int]) -> PairLengths:
    return PairLengths(*np.array(pairs, np.int64).reshape(-1, 3).T)


def answers(count: int, seed: int = 0) -> PairLengths:
    """Lengths spread as those of real answers, cut at 1024 tokens."""
    rng = np.random.default_rng(seed)
    prompt = np.clip(rng.lognormal(4.5, 1.0, count), 2, 512).astype(np.int64)
    sides = np.clip(rng.lognormal(5.5, 0.8, (2, count)), 2, 1024 - prompt).astype(np.int64)
    return PairLengths(prompt, *sides)


def global_micro_batches(plan: Plan) -> list[list[int]]:
    return [
        sorted(i for rank in range(plan.ranks) for i in plan.share(m, rank))
        for m in range(len(plan))
    ]


def step_pairs(plan: Plan) -> list[list[int]]:
    together = global_micro_batches(plan)
    ends = zip(plan.steps[:-1], plan.steps[1:], strict=True)
    return [[i for m in range(a, b) for i in together[m]] for a, b in ends]


@st.composite
def planners(draw: st.DrawFn, **fixed) -> Planner:
    parts = st.tuples(*[st.integers(1, 50)] * 3)
    pairs = draw(st.lists(parts, min_size=1, max_size=60))
    ranks = draw(st.integers(1, 5))
    micro_batches = draw(st.integers(1, 4))
    size = ranks * micro_batches * draw(st.integers(1, 3))
    options = {"coupled": draw(st.booleans()), "seed": draw(st.sampled_from([None, 0, 7]))}
    return Planner(lengths_of(*pairs), size, micro_batches, ranks, **options | fixed)


@settings(max_examples=60, deadline=None)
@given(planners(), st.integers(0, 3))
def test_every_pair_once_and_steps_of_exactly_their_size(planner, epoch):
    plan = planner.plan(epoch)
    steps = step_pairs(plan)
    count = len(planner.lengths)
    assert sorted(i for step in steps for i in step) == list(range(count))
    assert [len(step) for step in steps[:-1]] == [planner.pairs_per_step] * (len(steps) - 1)
    assert len(steps) == planner.steps_per_epoch == -(-count // planner.pairs_per_step)
    assert len(plan) == planner.micro_batches_per_epoch == plan.pairs.shape[0]
    assert (plan.pairs.sum(axis=1) > 0).all()
    whole = planner.whole_steps * planner.micro_batches
    assert (plan.pairs[:whole] > 0).all()  # no rank without a pair in a whole step
    again = planner.plan(epoch)
    assert (plan.order == again.order).all()
    assert (plan.bounds == again.bounds).all()


@settings(max_examples=40, deadline=None)
@given(planners(coupled=True), st.integers(1, 5))
def test_the_number_of_ranks_changes_no_coupled_micro_batch(planner, ranks):
    options = {"coupled": True, "seed": planner.seed}
    other = Planner(
        planner.lengths, planner.pairs_per_step, planner.micro_batches, ranks, **options
    )
    assert global_micro_batches(planner.plan(2)) == global_micro_batches(other.plan(2))


@settings(max_examples=40, deadline=None)
@given(planners(), st.booleans())
def test_steps_follow_from_seed_and_epoch_alone(planner, coupled):
    """Whatever the ranks and micro-batches, and whether pairs are coupled."""
    other = Planner(planner.lengths, planner.pairs_per_step, 1, 2, planner.seed, coupled)
    for mine, theirs in zip(step_pairs(planner.plan(1)), step_pairs(other.plan(1)), strict=True):
        assert sorted(mine) == sorted(theirs)


@settings(max_examples=40, deadline=None)
@given(planners(coupled=True))
def test_coupled_micro_batches_have_equal_counts(planner):
    plan = planner.plan()
    counts = plan.pairs.sum(axis=1)
    for first, last in zip(plan.steps[:-1], plan.steps[1:], strict=True):
        assert np.ptp(counts[first:last]) <= 1


@settings(max_examples=40, deadline=None)
@given(planners(drop_last=False))
def test_drop_last_leaves_out_less_than_a_micro_batch(planner):
    size = planner.pairs_per_step // planner.micro_batches
    arguments = (planner.lengths, planner.pairs_per_step, planner.micro_batches, planner.ranks)
    if len(planner.lengths) < size:
        with pytest.raises(UserError, match="dataloader_drop_last"):
            Planner(*arguments, drop_last=True)
        return
    dropping = Planner(*arguments, seed=planner.seed, coupled=planner.coupled, drop_last=True)
    plan = dropping.plan()
    assert len(plan) == dropping.micro_batches_per_epoch == len(planner.lengths) // size
    assert plan.pairs.sum() == len(plan) * size
    assert (plan.pairs > 0).all()


def test_epochs_and_seeds_differ():
    lengths = answers(64)
    plans = [Planner(lengths, 8, 2, seed=seed).plan(epoch) for seed, epoch in ((0, 0), (0, 1))]
    assert step_pairs(plans[0]) != step_pairs(plans[1])
    assert step_pairs(plans[1]) == step_pairs(Planner(lengths, 8, 2, seed=1).plan(0))


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize(("per_rank", "micro_batches"), [(1, 16), (2, 8), (4, 4), (16, 1)])
def test_balance_on_eight_ranks(coupled, per_rank, micro_batches):
    """Per step, largest rank within 5% of the mean; in every micro-batch close, if free to be."""
    size = 8 * per_rank * micro_batches
    for layout in ("packed", "prefix_shared"):
        planner = Planner(answers(4096), size, micro_batches, 8, coupled=coupled, layout=layout)
        tokens = planner.plan().tokens(layout).reshape(-1, micro_batches, 8)
        per_step = tokens.sum(axis=1)
        assert (per_step.max(axis=1) <= 1.05 * per_step.mean(axis=1)).all()
        if not coupled:
            assert tokens.max(axis=2).sum() <= 1.11 * tokens.mean(axis=2).sum()


@pytest.mark.parametrize("coupled", [True, False])
def test_balance_on_real_lengths(coupled):
    """8 ranks with 16 pairs each, on real pairs, cut to 1000 tokens of four characters."""
    if not DATA.is_file():
        pytest.skip(f"{DATA.name} is not here")
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    parts = [[r[k][-1]["content"] for r in rows] for k in ("prompt", "chosen", "rejected")]
    tokens = [np.array([min(1000, len(text) // 4 + 4) for text in part]) for part in parts]
    lengths = PairLengths(*tokens)
    for micro_batches in (1, 4, 8, 16):
        plan = Planner(lengths, 128, micro_batches, 8, coupled=coupled).plan()
        whole = plan.tokens("prefix_shared")[: len(lengths) // 128 * micro_batches]
        per_step = whole.reshape(-1, micro_batches, 8).sum(axis=1)
        assert (per_step.max(axis=1) <= 1.05 * per_step.mean(axis=1)).all()


def test_coupled_micro_batches_keep_the_mix_of_lengths():
    """Short and long pairs in each, as statistics over a micro-batch expect."""
    lengths = answers(4096)
    plan = Planner(lengths, 128, 8, 4).plan()
    within = [lengths.shared[m].std() for m in global_micro_batches(plan)]
    across = np.ptp([lengths.shared[m].mean() for m in global_micro_batches(plan)[:8]])
    assert np.mean(within) > 0.9 * lengths.shared.std()
    assert across < 0.1 * lengths.shared.mean()


def test_tokens_by_layout_by_hand():
    lengths = lengths_of((3, 5, 2), (1, 1, 4))
    plan = Planner(lengths, 2, 1, seed=None).plan()
    assert plan.tokens("padded").tolist() == [[2 * 2 * 8]]
    assert plan.tokens("packed").tolist() == [[13 + 7]]
    assert plan.tokens("prefix_shared").tolist() == [[10 + 6]]


def test_ranks_without_a_pair():
    """One pair over three ranks: two have none, and the shortest stands by to fill in."""
    plan = Planner(lengths_of((1, 1, 1), (9, 9, 9)), 3, 1, ranks=3, seed=None).plan()
    assert sorted(len(plan.share(0, rank)) for rank in range(3)) == [0, 1, 1]
    assert plan.shortest(0) == 0
    assert sorted(plan.tokens("padded").ravel().tolist()) == [0, 4, 36]


@given(st.integers(0, 100), st.integers(1, 20))
def test_even_shares(items, bins):
    shares = even_shares(items, bins)
    assert shares.sum() == items
    assert len(shares) == bins
    assert np.ptp(shares) <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=1, max_size=30), st.integers(1, 6), st.booleans())
def test_deal_is_within_the_bound_of_longest_first(values, bins, limited):
    tokens = np.array([values])
    room = even_shares(len(values), bins) if limited else None
    places, load = deal(tokens, bins, room)
    assert load.tolist() == [[tokens[places == b].sum() for b in range(bins)]]
    if room is not None:
        assert (np.bincount(places[0], minlength=bins) == room).all()
    else:  # Graham's bound against the mean and the longest
        assert load.max() <= max(values) + tokens.sum() / bins
