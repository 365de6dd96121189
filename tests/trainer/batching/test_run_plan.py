"""`max_tokens_per_micro_batch`, and what is said of a plan before training."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.batching.planner import Planner
from widemargin.trainer.batching.run_plan import (
    fit_micro_batches,
    raise_accumulation,
    summarise,
    with_limit,
)
from widemargin.trainer.errors import UserError

from tests.support.tiny_models import parameters_of, tiny_config, tiny_model, tiny_trainer
from tests.trainer.batching.test_planner import answers, global_micro_batches, lengths_of, planners


@settings(max_examples=60, deadline=None)
@given(planners(), st.integers(0, 200), st.integers(1, 3))
def test_the_fewest_micro_batches_that_fit(planner, more, epochs):
    limit = int(planner.lengths.alone(planner.layout).max()) + more
    found = with_limit(planner, limit, epochs)
    assert found.pairs_per_step == planner.pairs_per_step
    for epoch in range(epochs):
        plan = found.plan(epoch)
        assert plan.tokens(planner.layout).max() <= limit
        assert sorted(plan.order.tolist()) == list(range(len(planner.lengths)))
        assert (plan.pairs.sum(axis=1) > 0).all()
    for fewer in range(planner.micro_batches, found.micro_batches):
        plans = [with_micro_batches(planner, fewer).plan(epoch) for epoch in range(epochs)]
        assert max(plan.tokens(planner.layout).max() for plan in plans) > limit


def with_micro_batches(planner: Planner, count: int) -> Planner:
    rest = (planner.ranks, planner.seed, planner.coupled, planner.layout)
    return Planner(planner.lengths, planner.pairs_per_step, count, *rest)


@pytest.mark.parametrize("coupled", [True, False])
def test_accumulation_steps_that_do_not_divide_the_step(coupled):
    planner = Planner(answers(100), 32, 5, ranks=2, coupled=coupled)
    plan = planner.plan()
    assert np.add.reduceat(plan.pairs.sum(axis=1), plan.steps[:-1]).tolist() == [32, 32, 32, 4]
    assert np.diff(plan.steps).tolist() == [5, 5, 5, 1]
    if coupled:
        assert {len(m) for m in global_micro_batches(plan)[:15]} == {6, 7}


def test_a_pair_beyond_the_limit_is_named():
    planner = Planner(lengths_of((1, 1, 1), (50, 20, 9), (1, 2, 3)), 2, 1, 1, None, layout="packed")
    with pytest.raises(UserError, match=r"pair 1 of train_dataset takes 129 tokens.*max_length"):
        with_limit(planner, 128, 1)
    assert with_limit(planner, 129, 1).micro_batches == 2


def longest_pair(trainer: Any, layout: str) -> int:
    return int(trainer.train_dataset.lengths.alone(layout).max())


@pytest.mark.parametrize(("packing", "counted"), [("padded", 0), ("prefix_shared", 1)])
def test_training_with_a_limit_is_the_same_training(tmp_path, caplog, packing, counted):
    """An objective that takes pairs one by one gets the same steps in smaller micro-batches."""
    common = {"pairs": 10, "per_device_train_batch_size": 4, "max_steps": 5, "packing": packing}
    free = tiny_trainer(tmp_path, **common)
    free.train()
    longest = longest_pair(free, packing)
    with caplog.at_level(logging.WARNING):
        limited: Any = tiny_trainer(tmp_path, max_tokens_per_micro_batch=longest, **common)
    assert "gradient_accumulation_steps: " in caplog.text
    assert "couples" not in caplog.text
    steps = limited.args.gradient_accumulation_steps
    assert 1 < steps <= 4
    assert limited.args.pairs_per_step == 4
    sizes = []
    score = limited.compute_loss

    def seen(model, inputs, *args, **kwargs):
        sizes.append(int(inputs["decoder_tokens"][counted]))
        return score(model, inputs, *args, **kwargs)

    limited.compute_loss = seen
    limited.train()
    assert max(sizes) <= longest
    assert len(sizes) > 5
    torch.testing.assert_close(parameters_of(free.model), parameters_of(limited.model))
    assert (parameters_of(free.model) - parameters_of(tiny_model())).abs().max() > 1e-2


def test_ranks_that_share_a_row_share_its_limit(tmp_path):
    settings: Any = tiny_config(tmp_path, max_tokens_per_micro_batch=40, sequence_parallel_size=2)
    planner = Planner(lengths_of((2, 30, 10), (2, 50, 26)), 2, 1, seed=None, layout="packed")
    fitted = fit_micro_batches(settings, settings.build_objective(), planner)
    assert fitted.micro_batches == 2  # of 44 and of 80 tokens
    settings.sequence_parallel_size = 1
    with pytest.raises(UserError, match="takes 80 tokens by itself"):
        fit_micro_batches(settings, settings.build_objective(), planner)


def test_objectives_that_couple_pairs_hear_of_smaller_micro_batches(tmp_path, caplog):
    common = {"objective": "lmpo", "packing": "packed"}
    longest = longest_pair(tiny_trainer(tmp_path, **common), "packed")
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, max_tokens_per_micro_batch=longest, **common)
    assert "lmpo couples the pairs of a global micro-batch" in caplog.text


@pytest.mark.parametrize("limit", [0, -1, 1.5, "many", True])
def test_limits_that_make_no_sense(tmp_path, limit):
    with pytest.raises(UserError, match="max_tokens_per_micro_batch"):
        tiny_config(tmp_path, max_tokens_per_micro_batch=limit)


def test_deepspeed_learns_of_the_accumulation_steps(tmp_path):
    args: Any = tiny_config(tmp_path, gradient_accumulation_steps=2)
    filled = {"gradient_accumulation_steps": 2, "train_batch_size": 8}
    args.hf_deepspeed_config = SimpleNamespace(config=filled)
    raise_accumulation(args, 3)
    assert filled == {"gradient_accumulation_steps": 3, "train_batch_size": 12}
    assert args.gradient_accumulation_steps == 3
    assert args.pairs_per_step == 8


def test_the_summary_by_hand():
    lengths = lengths_of((2, 3, 1), (2, 6, 2), (2, 1, 1), (2, 1, 5))
    planner = Planner(lengths, 4, 1, ranks=2, seed=None)
    summary = summarise(planner)
    # The pair of 10 tokens and the one of 4 against those of 8 and 6.
    assert (summary.tokens, summary.padded_tokens) == (28, 4 * 8 + 4 * 7)
    assert (summary.step_balance, summary.micro_batch_balance) == (1.0, 1.0)
    assert (summary.largest_tokens, summary.largest_pairs) == (14, 2)
    text = "\n".join(summary.lines())
    assert "4 pairs a step, 1 step an epoch; 28 tokens a step, 28 an epoch" in text
    assert "0.47 of the 60 padded" in text
    assert "busiest of 2 ranks 1.000" in text
    text = "\n".join(summarise(planner, sharing=4).lines())
    assert "busiest of 2 groups of 4 ranks 1.000" in text
    assert "largest micro-batch of a group of 4 ranks 14 tokens, at most 2 pairs" in text
    text = "\n".join(replace(summary, noun="answer").lines())
    assert "4 answers a step" in text
    assert "at most 2 answers" in text
