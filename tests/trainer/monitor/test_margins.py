"""Margins that evaluations in training leave: the right bins, ranks' fillers, nothing changed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from widemargin.trainer.monitor.margins import BINS, MARGINS_FILE, SAMPLES_FILE, read_margins
from widemargin.trainer.monitor.observer import MarginRecorder, append

from tests.support.tiny_models import tiny_trainer


def output(gaps: list[float], real: list[bool] | None = None) -> Any:
    margins = torch.tensor(gaps)
    kept = torch.tensor(real or [True] * len(gaps))
    return SimpleNamespace(
        chosen_rewards=margins,
        rejected_rewards=torch.zeros_like(margins),
        target_margins=torch.full_like(margins, 0.5),
        real=kept,
    )


def test_every_real_finite_margin_is_counted_once(tmp_path):
    recorder = MarginRecorder()
    recorder.add(output([0.0, 1e-4, -3.0, 1e9, -1e9]))
    recorder.add(output([2.0, 2.0, float("nan"), float("inf")], [True, False, True, True]))
    recorder.write(str(tmp_path), 7, main=True)
    found = read_margins(tmp_path)
    rewards = found["reward_margins"][7]
    assert rewards.pairs == 6
    assert rewards.share_above_zero() == pytest.approx(3 / 6)  # zero itself is not above
    assert (rewards.counts[0], rewards.counts[BINS - 1]) == (1, 1)
    assert found["target_margins"][7].pairs == 8
    assert found["target_margins"][7].quantile(0.5) == pytest.approx(0.5, abs=0.06)


def test_lines_follow_an_unfinished_one(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    append(path, '{"c": 2}\n')
    assert path.read_text() == '{"a": 1}\n{"b"\n{"c": 2}\n'


def test_training_goes_on_where_they_cannot_be_written(tmp_path, caplog):
    every_step = {"eval_pairs": 4, "eval_strategy": "steps", "eval_steps": 1}
    sampled = {"eval_samples": 1, "eval_samples_max_new_tokens": 2}
    trainer = tiny_trainer(tmp_path / "run", **every_step, **sampled)

    class Blocking(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            for name in (MARGINS_FILE, SAMPLES_FILE):  # a folder in its place, even for root
                (tmp_path / "run" / name).mkdir(parents=True, exist_ok=True)

    trainer.add_callback(Blocking())
    assert trainer.train().global_step == 3
    for name in (MARGINS_FILE, SAMPLES_FILE):
        assert caplog.text.count(f"{name} cannot be written") == 1


def test_training_writes_them_at_evaluations_only(tmp_path):
    evaluations = {"eval_pairs": 7, "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny_trainer(
        tmp_path, objective="lmpo", eval_on_start=True, max_steps=4, **evaluations
    )
    (tmp_path / MARGINS_FILE).write_text('{"step": 99}\n')  # of an earlier run
    trainer.train()
    found = read_margins(tmp_path)
    for by_step in found.values():
        assert list(by_step) == [0, 2, 4]
        assert all(histogram.pairs == 7 for histogram in by_step.values())
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    accuracies = {entry["step"]: entry["eval_rewards/accuracies"] for entry in evaluated}
    for step, histogram in found["reward_margins"].items():
        assert histogram.share_above_zero() == pytest.approx(accuracies[step])
    lines = (tmp_path / MARGINS_FILE).read_text()
    trainer.evaluate()
    assert (tmp_path / MARGINS_FILE).read_text() == lines
    assert all(json.loads(line) for line in lines.splitlines())
