"""A checkpoint of an epoch's last step has what was logged and measured at that step."""

from __future__ import annotations

import json

import pytest

from tests.support.tiny_models import tiny_trainer

BY_EPOCH = {"eval_strategy": "epoch", "logging_strategy": "epoch"}


@pytest.mark.parametrize("save_steps", [2, 100])
def test_the_end_of_an_epoch_is_logged_before_its_checkpoint_is_saved(tmp_path, save_steps):
    settings = {"num_train_epochs": 1, "max_steps": -1, "eval_pairs": 4, "save_steps": save_steps}
    trainer = tiny_trainer(tmp_path, **settings, **BY_EPOCH, save_strategy="steps")
    trainer.train()
    last = tmp_path / f"checkpoint-{trainer.state.global_step}"
    saved = json.loads((last / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in saved if "eval_loss" in entry] == [trainer.state.global_step]
    assert [entry["step"] for entry in saved if "loss" in entry] == [trainer.state.global_step]
    logged = [entry for entry in trainer.state.log_history if "train_loss" not in entry]
    assert saved == logged  # once, and not again when the epoch ends
