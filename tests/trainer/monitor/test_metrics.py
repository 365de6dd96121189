"""Metrics mean what their names do elsewhere: computed again from tokens alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from widemargin.trainer.monitor.metrics import PreferenceMetrics
from widemargin.trainer.objectives import build_objective

from tests.support.preference_batches import mean, pack, random_pairs, reference_sums
from tests.support.tiny_models import tiny_model, tiny_trainer


def reported(name: str, **given) -> dict[str, float]:
    """The report of two micro-batches of unequal sizes, with a filler."""
    objective, metrics = build_objective(name, **given), PreferenceMetrics()
    for part in (PAIRS[:5], [*PAIRS[5:], FILLER]):
        tokens, cu_seqlens = pack(part)
        ids = torch.tensor([-1 if pair is FILLER else i for i, pair in enumerate(part)])
        out = objective(tokens, cu_seqlens, reference_sums(part), pair_ids=ids)
        metrics.add_pairs(out, 2 * tokens, cu_seqlens)
        figures = torch.stack([tokens, -3 * tokens, (tokens > -0.2).double()])
        metrics.add_figures(out, figures, cu_seqlens)
    return metrics.report()[0]


PAIRS = random_pairs(np.random.default_rng(0), 8)
FILLER = ([-100.0], [-100.0])
CHOSEN = [token for pair in PAIRS for token in pair[0]]
REJECTED = [token for pair in PAIRS for token in pair[1]]


@pytest.mark.parametrize(
    ("name", "given", "sums"),
    [
        ("dpo", {}, True),
        ("dpo", {"length_norm": True}, True),  # as TRL's sigmoid_norm
        ("ipo", {}, True),
        ("kto", {}, True),
        ("cpo", {}, True),
        ("dpo + sft", {}, True),
        ("cpo", {"length_norm": True}, False),
        ("cpo-ipo", {}, False),
        ("simpo", {}, False),
        ("orpo", {}, False),
        ("lmpo", {}, False),
    ],
)
def test_logps_are_the_sums_or_means_that_the_objective_compares(name, given, sums):
    found = reported(name, **given)
    score = math.fsum if sums else mean
    for side, place in (("chosen", 0), ("rejected", 1)):
        expected = mean([score(pair[place]) for pair in PAIRS])
        assert found[f"logps/{side}"] == pytest.approx(expected)
        means = mean([mean(pair[place]) for pair in PAIRS])
        assert found[f"logps/{side}_mean"] == pytest.approx(means)


def test_figures_of_tokens_are_means_over_tokens():
    found = reported("dpo")
    assert found["nll_loss"] == pytest.approx(-mean(CHOSEN))
    assert found["logits/chosen"] == pytest.approx(2 * mean(CHOSEN))
    assert found["logits/rejected"] == pytest.approx(2 * mean(REJECTED))
    assert found["entropy"] == pytest.approx(-3 * mean(CHOSEN + REJECTED))
    accuracy = mean([float(token > -0.2) for token in CHOSEN])
    assert found["mean_token_accuracy"] == pytest.approx(accuracy)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_a_run_logs_entropy_and_accuracy_where_asked(tmp_path, name):
    trainer = tiny_trainer(
        tmp_path, objective=name, max_steps=2, logging_steps=1, token_metrics=True
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    vocabulary = tiny_model().config.vocab_size
    assert 0.5 * math.log(vocabulary) < logs["entropy"] <= math.log(vocabulary)
    assert 0 <= logs["mean_token_accuracy"] <= 1
    assert logs["nll_loss"] > 0
    plain = tiny_trainer(tmp_path / "plain", objective=name, max_steps=1, logging_steps=1)
    plain.train()
    assert "entropy" not in plain.state.log_history[0]
    assert plain.state.log_history[0]["loss"] == logs["loss"]


@pytest.mark.costly
def test_a_run_weighs_pairs(tmp_path):
    losses = []
    for weighted in (False, True):
        trainer = tiny_trainer(
            tmp_path / str(weighted), objective="dpo", max_steps=1, logging_steps=1,
            objective_args={"use_weighting": weighted, "ld_alpha": 0.5},
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert "entropy" not in trainer.state.log_history[0]  # which weights need, and metrics not
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[1] > 0
    assert losses[1] != pytest.approx(losses[0], rel=0.01)


@pytest.mark.costly
@pytest.mark.parametrize("packing", ["padded", "prefix_shared"])
def test_tokens_of_the_run_so_far_are_counted_as_trl_does(tmp_path, packing):
    """Prompt and answer of either side of every pair; over the break of a resumed run too."""
    settings = {"packing": packing, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    settings |= {"logging_steps": 3, "pairs": 12, "per_device_train_batch_size": 4}
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train()
    rows: Any = trainer.train_dataset
    rows = [rows[i] for i in range(len(rows))]
    total = sum(2 * len(row["prompt_ids"]) for row in rows)
    total += sum(len(row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected"))
    assert trainer.state.log_history[0]["num_tokens"] == total
    resumed = tiny_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.log_history[0]["num_tokens"] == total
