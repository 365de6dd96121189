"""What trackers get: the metrics by their names, through transformers' own callbacks."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import tiny_trainer
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from widemargin.trainer.metrics import NAMES

EVALUATIONS = {"eval_pairs": 5, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}


class Tracker(TrainerCallback):
    """Keeps what `on_log` gets."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Writer:
    """Stands in for TensorBoard's writer."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value

    def add_text(self, name: str, content: str) -> None:
        json.loads(content)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_trackers_get_every_name_as_a_number(tmp_path):
    trainer = tiny_trainer(tmp_path, objective="lmpo", **EVALUATIONS)
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    training = next(logs for logs in tracker.logs if "loss" in logs)
    held_out = next(logs for logs in tracker.logs if "eval_loss" in logs)
    assert set(NAMES) <= training.keys()
    assert {f"eval_{name}" for name in NAMES} <= held_out.keys()
    assert {"pairs_per_s", "tokens_per_s", "peak_memory_mib"} <= training.keys()
    assert all(isinstance(value, int | float) for value in (training | held_out).values())


def test_tensorboard_s_own_callback_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    writer = Writer()
    trainer = tiny_trainer(tmp_path, objective="lmpo", **EVALUATIONS)
    trainer.add_callback(integration_utils.TensorBoardCallback(tb_writer=writer))
    trainer.train()
    assert {f"train/{name}" for name in NAMES} <= writer.scalars.keys()
    assert {f"eval/{name}" for name in NAMES} <= writer.scalars.keys()
    assert writer.scalars["eval/rewards/accuracies"] == pytest.approx(
        trainer.state.log_history[-2]["eval_rewards/accuracies"]
    )
