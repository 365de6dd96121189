"""The trace: where it goes, which steps it holds, what is printed, and what the flag does."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from widemargin.trainer import cli
from widemargin.trainer.monitor import profiling
from widemargin.trainer.monitor.profiling import FILE

from tests.support.tiny_models import parameters_of, tiny_trainer


@pytest.mark.costly
@pytest.mark.parametrize(("steps", "traced"), [(7, 3), (4, 3), (2, 2), (1, 1)])
def test_a_trace_of_a_few_steps(tmp_path, capsys, steps, traced):
    trainer = tiny_trainer(tmp_path, profile=True, max_steps=steps)
    trainer.train()
    printed = capsys.readouterr().out
    assert "operation" in printed
    assert f"trace: {tmp_path / FILE}" in printed
    with gzip.open(tmp_path / FILE, "rt") as file:
        events = json.load(file)["traceEvents"]
    updates = [e for e in events if str(e.get("name")).startswith("Optimizer.step#SGD.step")]
    assert len(updates) == traced


@pytest.mark.costly
def test_a_run_that_stops_early_still_writes_its_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "TRACED", 100)
    trainer = tiny_trainer(tmp_path, profile=True, max_steps=50)

    class Stop(profiling.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer.add_callback(Stop())
    trainer.train()
    assert (tmp_path / FILE).is_file()


@pytest.mark.costly
def test_a_trace_changes_nothing(tmp_path):
    models = []
    for profile in (False, True):
        trainer = tiny_trainer(tmp_path, profile=profile)
        trainer.train()
        models.append(parameters_of(trainer.model))
    assert torch.equal(*models)
    assert sum(path.name == FILE for path in tmp_path.iterdir()) == 1


def test_the_flag_alone_means_true(monkeypatch):
    seen = []

    def load(path, overrides, **kwargs):
        seen.append(overrides)

    monkeypatch.setattr("widemargin.trainer.settings.files.load_config", load)
    monkeypatch.setattr("widemargin.trainer.train.train", lambda *_: None)
    assert cli.main(["train", "x.yaml", "--profile", "--beta=2"]) == 0
    assert cli.main(["train", "--profile=false", "x.yaml"]) == 0
    assert seen == [["--profile=true", "--beta=2"], ["--profile=false"]]
