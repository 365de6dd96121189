"""Which checkpoint is the best one of a run that goes on: in a moved folder, and in another's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from widemargin.trainer import PreferenceTrainer

from tests.support.tiny_models import tiny_model, tiny_trainer

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05}
FIRST_IS_BEST: dict[str, Any] = SAVING | {
    "eval_pairs": 4, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss",
    "greater_is_better": True, "load_best_model_at_end": True,
}  # fmt: skip


def has_weights_of(trainer: PreferenceTrainer, folder: Path) -> bool:
    saved = load_file(folder / "model.safetensors")
    model: Any = trainer.model
    return all(torch.equal(saved[name], p) for name, p in model.named_parameters() if name in saved)


@pytest.mark.parametrize("steps", [3, 4])
def test_the_best_is_found_where_the_run_was_moved(tmp_path, steps):
    """Also when nothing is left to train, and so no checkpoint is saved."""
    tiny_trainer(tmp_path / "a", **FIRST_IS_BEST).train()
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = tiny_trainer(tmp_path / "b", **FIRST_IS_BEST, max_steps=steps)
    trainer.train(resume_from_checkpoint=True)
    best = tmp_path / "b" / f"checkpoint-{trainer.state.best_global_step}"
    assert best.name != "checkpoint-3"
    assert trainer.state.best_model_checkpoint == str(best)
    assert has_weights_of(trainer, best)


def test_the_best_is_none_of_another_runs(tmp_path):
    """In a folder with another run's checkpoints of the same steps."""
    first = tiny_trainer(tmp_path / "a", **FIRST_IS_BEST)
    first.train()
    best = tmp_path / "a" / f"checkpoint-{first.state.best_global_step}"
    tiny_trainer(tmp_path / "b", tiny_model(seed=3), **SAVING).train()
    again = tiny_trainer(tmp_path / "b", **FIRST_IS_BEST, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.state.best_model_checkpoint == str(best)
    assert has_weights_of(again, best)
