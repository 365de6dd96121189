"""Trees in a line: exact steps, whole trees as far as they fit, and what limits cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.batching.line import in_steps
from widemargin.trainer.batching.planner import Planner
from widemargin.trainer.batching.run_plan import summarise, with_limit
from widemargin.trainer.data.table import PairLengths, Trees
from widemargin.trainer.packing import PairCollator

from tests.trainer.batching.test_planner import global_micro_batches, step_pairs


def forest(sizes: list[int], seed: int = 0) -> PairLengths:
    """Lengths of trees of so many pairs, the best answer against each other one; shuffled."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(sum(sizes))
    tree = np.repeat(np.arange(len(sizes)), sizes)
    answers = rng.integers(1, 50, (len(sizes), max(sizes) + 1))
    place = np.concatenate([np.arange(1, size + 1) for size in sizes])
    leaves = np.stack([tree * 100, tree * 100 + place], axis=1)
    prompts = rng.integers(1, 50, len(sizes))[tree]
    lengths = PairLengths(
        prompts, answers[tree, 0], answers[tree, place], Trees(tree, leaves)
    ).take(order)
    # Numbered by first appearance, as rows number them.
    numbers = lengths.trees.sequences().tree  # pyright: ignore[reportOptionalMemberAccess]
    assert len(np.unique(numbers)) == len(sizes)
    _, first, inverse = np.unique(lengths.tree, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return replace(lengths, trees=Trees(rank[inverse], lengths.trees.leaves))  # pyright: ignore


@st.composite
def planners(draw: st.DrawFn, **fixed) -> Planner:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=30))
    ranks, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = ranks * micro_batches * draw(st.integers(1, 6))
    options = {"coupled": draw(st.booleans()), "seed": draw(st.sampled_from([None, 0, 7]))}
    options["layout"] = draw(st.sampled_from(["padded", "packed", "prefix_shared"]))
    return Planner(forest(sizes), size, micro_batches, ranks, **options | fixed)


@settings(max_examples=80, deadline=None)
@given(planners(), st.integers(0, 2))
def test_every_pair_once_and_no_micro_batch_empty(planner, epoch):
    plan = planner.plan(epoch)
    steps = step_pairs(plan)
    count = len(planner.lengths)
    assert sorted(i for step in steps for i in step) == list(range(count))
    assert [len(step) for step in steps[:-1]] == [planner.pairs_per_step] * (len(steps) - 1)
    assert len(plan) == planner.micro_batches_per_epoch == plan.pairs.shape[0]
    assert (plan.pairs.sum(axis=1) > 0).all()
    assert (plan.order == planner.plan(epoch).order).all()


@settings(max_examples=40, deadline=None)
@given(planners(coupled=True), st.integers(1, 4))
def test_the_number_of_ranks_changes_no_coupled_micro_batch(planner, ranks):
    other = replace(planner, ranks=ranks, layout="packed")
    assert global_micro_batches(planner.plan(2)) == global_micro_batches(other.plan(2))


@settings(max_examples=40, deadline=None)
@given(planners(), st.booleans())
def test_steps_follow_from_seed_and_epoch_alone(planner, coupled):
    other = replace(planner, micro_batches=1, ranks=2, coupled=coupled)
    for mine, theirs in zip(step_pairs(planner.plan(1)), step_pairs(other.plan(1)), strict=True):
        assert sorted(mine) == sorted(theirs)


@settings(max_examples=40, deadline=None)
@given(planners())
def test_planned_tokens_are_those_of_the_collator(planner):
    plan, lengths = planner.plan(), planner.lengths
    tokens = plan.tokens(planner.layout)
    collator = PairCollator(0, layout=planner.layout, rows="varlen")
    for place in range(min(3, len(plan))):
        for rank in range(plan.ranks):
            pairs = plan.share(place, rank)
            if not pairs:
                continue
            rows = [
                {
                    "prompt_ids": [1] * int(lengths.prompt[i]),
                    "chosen_ids": [1] * int(lengths.chosen[i]),
                    "rejected_ids": [1] * int(lengths.rejected[i]),
                    "tree_id": lengths.tree[i],
                    "leaf_ids": lengths.trees.leaves[i],
                }
                for i in pairs
            ]
            assert collator(rows)["input_ids"].numel() == tokens[place, rank]


def test_trees_that_fill_steps_are_never_cut():
    lengths = forest([6] * 20 + [5, 5, 2] * 4)
    plan = Planner(lengths, 12, 2, coupled=False).plan()
    trees, parts = plan.trees
    assert trees == parts == 32
    assert plan.pairs.max() == 6 + 1 or plan.pairs.max() == 6


def test_a_tree_that_fits_in_no_step_is_cut_and_counted():
    plan = Planner(forest([9, 4, 4, 4]), 6, 1).plan()
    assert [len(step) for step in step_pairs(plan)] == [6, 6, 6, 3]
    summary = summarise(Planner(forest([9, 4, 4, 4]), 6, 1))
    assert summary.trees == 4
    assert summary.cut_trees == plan.trees[1] - 4 > 0
    assert f"trees are cut {summary.cut_trees} times" in summary.lines()[-1]
    whole = summarise(Planner(forest([6] * 4), 6, 1)).lines()[-1]
    assert whole.startswith("  4 trees, 24 pairs, ")
    assert "cut" not in whole
    assert len(summarise(Planner(forest([6] * 4).apart, 6, 1)).lines()) == 2


@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
def test_a_limit_on_tokens_cuts_trees_and_drops_nothing(layout):
    planner = Planner(forest([8] * 6), 16, 1, layout=layout)
    limit = int(planner.lengths.alone(layout).max()) + 40
    fitted = with_limit(planner, limit, epochs=2)
    for epoch in range(2):
        plan = fitted.plan(epoch)
        assert plan.tokens(layout).max() <= limit
        assert sorted(plan.order.tolist()) == list(range(48))
    assert fitted.plan().trees[1] > 6
    assert fitted.micro_batches < 16  # not down to single pairs


def test_without_shared_prompts_the_line_is_the_order():
    order = np.random.default_rng(0).permutation(10)
    line = in_steps(PairLengths(*np.ones((3, 10), np.int64)), order, 4)
    assert (line.pairs == order).all()
    assert line.sizes.tolist() == [1] * 10
