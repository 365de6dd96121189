"""What trackers get: the metrics by their names, through transformers' own callbacks."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock

import pytest
from transformers import TrainerCallback
from widemargin.trainer.settings.names import METRICS

from tests.support.tiny_models import tiny_trainer

EVALUATIONS = {"eval_pairs": 5, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}


class Tracker(TrainerCallback):
    """Keeps what `on_log` gets."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def module(monkeypatch: pytest.MonkeyPatch, name: str) -> MagicMock:
    """A module of this name that can be imported and takes any call."""
    stand_in = MagicMock(name=name)
    stand_in.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, stand_in)
    return stand_in


def test_trackers_get_every_name_as_a_number(tmp_path):
    trainer = tiny_trainer(tmp_path, objective="lmpo", **EVALUATIONS)
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    training = next(logs for logs in tracker.logs if "loss" in logs)
    held_out = next(logs for logs in tracker.logs if "eval_loss" in logs)
    assert set(METRICS) <= training.keys()
    assert {f"eval_{name}" for name in METRICS} <= held_out.keys()
    assert {"pairs_per_s", "tokens_per_s", "peak_memory_mib"} <= training.keys()
    assert all(isinstance(value, int | float) for value in (training | held_out).values())


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_report_to_gives_each_tracker_the_names(tmp_path, monkeypatch, tracker):
    """Through `report_to` and transformers' own callback; the tracker's package stands in."""
    stand_in = module(monkeypatch, tracker)
    log = stand_in.log
    if tracker == "tensorboard":
        log = module(monkeypatch, "torch.utils.tensorboard").SummaryWriter().add_scalar
    elif tracker == "wandb":
        for part in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
            module(monkeypatch, part).ConfigError = ValueError
    else:
        stand_in.__version__ = "1.0"
        stand_in.context_vars.current_space_id.get.return_value = None
        stand_in.freeze.return_value = None
    trainer = tiny_trainer(tmp_path, objective="lmpo", report_to=[tracker], **EVALUATIONS)
    trainer.train()
    logged: dict[str, float] = {}
    for call in log.call_args_list:
        logged |= dict([call.args[:2]]) if tracker == "tensorboard" else call.args[0]
    wanted = {f"train/{name}" for name in (*METRICS, "pairs_per_s", "tokens_per_s")}
    assert wanted | {f"eval/{name}" for name in METRICS} <= logged.keys()
    assert logged["eval/rewards/accuracies"] == pytest.approx(
        trainer.state.log_history[-2]["eval_rewards/accuracies"]
    )
