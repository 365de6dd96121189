"""Checkpoints: complete or absent, verified at resume, of the same run, and safe on a full disk."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.checkpoint import resume
from widemargin.trainer.checkpoint.files import (
    BrokenCheckpoint,
    check_files,
    choose_checkpoint,
    could_not_write,
    newest_complete,
    settle_leftovers,
)
from widemargin.trainer.data import template
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import bot, user
from tests.support.tiny_models import parameters_of, tiny_config, tiny_model, tiny_trainer
from tests.support.tiny_tokenizers import WITH_BOS, tiny_tokenizer

SAVING: dict[str, Any] = {
    "objective": "lmpo", "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4,
    "save_strategy": "steps", "save_steps": 2, "pairs": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of four steps with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, **SAVING).train()
    return folder


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_checkpoint_holds(run):
    assert names(run) == {"checkpoint-2", "checkpoint-4"}
    manifest = check_files(run / "checkpoint-4")
    assert manifest["step"] == 4
    assert set(manifest["files"]) == names(run / "checkpoint-4") - {"manifest.json"}
    assert {
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "objective.safetensors", "trainer_state.json",
    } <= set(manifest["files"])  # fmt: skip
    assert "training_args.bin" not in manifest["files"]
    assert manifest["run"]["pairs_per_step"] == 4


def test_torch_files_load_without_running_code(run):
    from transformers.trainer_pt_utils import safe_globals

    suffixes = (".pt", ".pth", ".bin")
    paths = [path for path in (run / "checkpoint-4").iterdir() if path.suffix in suffixes]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= {path.name for path in paths}
    for path in paths:
        with safe_globals():
            torch.load(path, weights_only=True)


def test_bit_flips_are_noticed_in_every_file(copied):
    folder = copied / "checkpoint-4"
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            flipped = bytearray(content)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(BrokenCheckpoint, match=path.name):
                check_files(folder)
            with pytest.raises(UserError, match=f"broken: {path.name}"):
                choose_checkpoint(str(folder), copied)
        path.write_bytes(content)
    check_files(folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda f: os.truncate(f / "model.safetensors", 100), "model.safetensors has 100 bytes"),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (
            lambda f: (f / "manifest.json").write_text("{}"),
            "manifest.json is not one of this version",
        ),
    ],
)
def test_a_broken_one_is_passed_over_with_the_reason(copied, caplog, damage, reason):
    damage(copied / "checkpoint-4")
    assert newest_complete(copied)[0] == copied / "checkpoint-2"
    assert choose_checkpoint("auto", copied) == copied / "checkpoint-2"
    assert f"checkpoint-4: {reason}" in caplog.text
    damage(copied / "checkpoint-2")
    for wanted in (True, "auto"):
        with pytest.raises(UserError, match=r"no complete checkpoint.*" + reason):
            choose_checkpoint(wanted, copied)


def test_nothing_to_go_on_from(tmp_path):
    assert choose_checkpoint("auto", tmp_path / "none") is None
    assert choose_checkpoint(None, tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        choose_checkpoint(True, tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        choose_checkpoint(str(tmp_path / "x"), tmp_path)


def test_going_on_from_the_one_before_gives_the_same(run, copied):
    """The newest is broken; steps 3 and 4 are made again, and it is replaced."""
    (copied / "checkpoint-4" / "scheduler.pt").write_bytes(b"")
    trainer = tiny_trainer(copied, model=tiny_model(seed=3), **SAVING)
    trainer.train(resume_from_checkpoint="auto")
    check_files(copied / "checkpoint-4")
    assert names(copied) == {"checkpoint-2", "checkpoint-4"}
    again = tiny_trainer(copied / "other", **SAVING)
    again.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert torch.equal(parameters_of(trainer.model), parameters_of(again.model))


def test_without_a_manifest_only_by_name(copied, caplog):
    (copied / "checkpoint-4" / "manifest.json").unlink()
    folder = str(copied / "checkpoint-4")
    assert choose_checkpoint(folder, copied) == Path(folder)
    assert "unchecked" in caplog.text


def test_leftovers_are_finished_or_removed(copied):
    (copied / "tmp-checkpoint-6" / "checkpoint-6").mkdir(parents=True)
    (copied / "tmp-removed-1").mkdir()
    (copied / "tmp-checkpoint-4").mkdir()
    (copied / "checkpoint-4").rename(copied / "tmp-checkpoint-4" / "checkpoint-4")
    settle_leftovers(copied)
    assert names(copied) == {"checkpoint-2", "checkpoint-4"}
    check_files(copied / "checkpoint-4")


@pytest.mark.parametrize(("limit", "left"), [(1, {4}), (2, {3, 4}), (None, {1, 2, 3, 4})])
def test_rotation(tmp_path, limit, left):
    tiny_trainer(tmp_path, **SAVING | {"save_steps": 1, "save_total_limit": limit}).train()
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}


def test_the_best_stays_and_is_named(tmp_path):
    trainer = tiny_trainer(
        tmp_path, eval_pairs=4, eval_strategy="steps", eval_steps=1, metric_for_best_model="loss",
        greater_is_better=True, load_best_model_at_end=True,
        **SAVING | {"save_steps": 1, "save_total_limit": 2, "learning_rate": 0.05},
    )  # fmt: skip
    trainer.train()
    best = f"checkpoint-{trainer.state.best_global_step}"
    folders = list(tmp_path.glob("checkpoint-*"))
    assert {folder.name for folder in folders} == {best, "checkpoint-4"} | (
        {"checkpoint-3"} if best == "checkpoint-4" else set()
    )
    for folder in folders:
        state = json.loads((folder / "trainer_state.json").read_text())
        named = state["best_model_checkpoint"]
        assert named == str(tmp_path / f"checkpoint-{state['best_global_step']}")


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing further fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "optimizer.pt"])
def test_a_disk_that_fills_up(run, tmp_path, caplog, file):
    """The second of two checkpoints cannot be written: the first stays, and training ends well."""
    size = (run / "checkpoint-4" / file).stat().st_size - 1
    trainer: Any = tiny_trainer(tmp_path, **SAVING)
    save = trainer._save_checkpoint

    def save_with_limit(*args: Any) -> None:
        with files_of_at_most(size) if trainer.state.global_step == 4 else contextlib.nullcontext():
            save(*args)

    trainer._save_checkpoint = save_with_limit
    trainer.train()
    assert trainer.state.global_step == 4
    assert names(tmp_path) == {"checkpoint-2"}
    check_files(tmp_path / "checkpoint-2")
    assert "Step 4: the checkpoint could not be saved" in caplog.text
    assert f"{tmp_path / 'checkpoint-2'} is complete" in caplog.text


def test_other_errors_in_saving_are_not_taken_for_a_full_disk(tmp_path):
    trainer: Any = tiny_trainer(tmp_path, **SAVING)
    trainer._save_scaler = lambda folder: (_ for _ in ()).throw(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objective": "simpo"}, "objective name was lmpo, is simpo"),
        ({"beta": 3.5}, r"objective beta was .*, is 3.5"),
        ({"seed": 5}, "seed was 42, is 5"),
        ({"pairs": 11}, "had 10 pairs, has 11"),
        ({"max_completion_length": 2}, "other tokens"),
        ({"learning_rate": 1e-4}, "learning_rate was 0.001, is 0.0001"),
        (
            {"per_device_train_batch_size": 2},
            "pairs_per_step was 4, is 2: set per_device_train_batch_size: 4, "
            "gradient_accumulation_steps: 1",
        ),
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps was 1, is 2 .lmpo couples",
        ),
    ],
)
def test_another_run_is_refused_with_the_reason(run, tmp_path, changes, reason):
    trainer = tiny_trainer(tmp_path, **SAVING | changes)
    with pytest.raises(UserError, match=reason):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_another_model_is_refused(run, tmp_path):
    trainer = tiny_trainer(tmp_path, model=tiny_model(num_hidden_layers=1), **SAVING)
    with pytest.raises(UserError, match="model layers was 2, is 1"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_weights_alone_cannot_go_on(tmp_path):
    settings = SAVING | {"save_only_model": True}
    tiny_trainer(tmp_path, **settings).train()
    with pytest.raises(UserError, match="weights alone"):
        tiny_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)


def test_pushed_only_under_its_name(tmp_path, monkeypatch):
    from widemargin.trainer.loop import outputs

    pushed = []

    def push(trainer, folder):
        pushed.append((folder.name, (folder / "manifest.json").is_file()))

    monkeypatch.setattr(outputs, "push_checkpoint", push)
    trainer = tiny_trainer(tmp_path, **SAVING)
    trainer.add_callback(_Pushing())
    trainer.train()
    assert pushed == [("checkpoint-2", True), ("checkpoint-4", True)]


class _Pushing(TrainerCallback):
    """Asks for a push once there is no repository to make any more."""

    def on_step_begin(self, args, state, control, **kwargs):
        args.push_to_hub = True

    def on_train_end(self, args, state, control, **kwargs):
        args.push_to_hub = False


def test_a_finished_run_takes_no_step_more(run, tmp_path):
    trainer = tiny_trainer(tmp_path, **SAVING)
    result = trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert result.global_step == 4


@pytest.mark.parametrize("kind", [Exception, RuntimeError, OSError])
def test_a_full_disk_by_whatever_name(kind):
    assert could_not_write(kind("No space left on device (os error 28)"))
    assert not could_not_write(TypeError("No space left on device"))
    assert not could_not_write(Exception("a bug"))


def test_weights_that_overflow_are_not_saved(tmp_path):
    """By an update whose gradient is finite: neither a checkpoint nor the end of the run."""
    for saving in ({"save_steps": 1}, {"save_strategy": "no"}):
        trainer = tiny_trainer(tmp_path, **SAVING | saving | {"max_steps": 1, "optim": "sgd"})
        trainer.add_callback(_Overflowing())
        with pytest.raises(UserError, match="after step 1 the model has weights that are not fin"):
            trainer.train()
        assert not list(tmp_path.glob("*checkpoint-*"))


class _Overflowing(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        next(model.parameters()).data[0, 0] = float("inf")


def test_a_folder_of_weights_alone_is_no_checkpoint(tmp_path):
    """Without its optimizer a run would go on as another one."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"has no optimizer's state.*model_name_or_path: "):
        choose_checkpoint(str(folder), tmp_path)
    (folder / "optimizer.pt").touch()
    assert choose_checkpoint(str(folder), tmp_path) == folder


def test_a_finished_run_says_so_when_it_is_resumed(copied, caplog):
    trainer = tiny_trainer(copied, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert f"{copied / 'checkpoint-4'} is the end of its run, so nothing was left" in caplog.text
    assert "raise max_steps to go on" in caplog.text
    caplog.clear()
    tiny_trainer(copied, **SAVING).train(resume_from_checkpoint=str(copied / "checkpoint-2"))
    assert "the end of its run" not in caplog.text


@pytest.mark.parametrize("setting", ["auto", "checkpoint-2"])
def test_a_dated_run_keeps_its_date_on_another_day(tmp_path, monkeypatch, caplog, setting):
    rows = [
        {"prompt": [user(f"wet {i}?")], "chosen": [bot("yes")], "rejected": [bot("no")]}
        for i in range(4)
    ]
    days = iter(["2026-01-31", "2026-02-01"])

    def trainer_of(steps: int, day: str, **settings: Any) -> Any:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return datetime.date.fromisoformat(day)

        for module in (resume.datetime, template.datetime):
            monkeypatch.setattr(module, "date", Day)
        config = tiny_config(
            tmp_path, save_strategy="steps", save_steps=2, max_steps=steps, **settings
        )
        tokenizer = tiny_tokenizer("{{ strftime_now('%d %b %Y') }}" + WITH_BOS)
        data = Dataset.from_list(rows)
        return PreferenceTrainer(
            tiny_model(), config, train_dataset=data, processing_class=tokenizer
        )

    trainer_of(2, next(days)).train()
    named = setting if setting == "auto" else str(tmp_path / setting)
    resumed = trainer_of(3, next(days), resume_from_checkpoint=named)
    assert resumed.args.chat_date == "2026-01-31"
    shown = resumed.processing_class.decode(resumed.train_dataset.source[0]["prompt_ids"])
    assert shown.startswith("31 Jan 2026")
    assert resumed.train(resume_from_checkpoint=named).global_step == 3
    assert "chat_date was" not in caplog.text
    fresh = trainer_of(2, "2026-02-02", resume_from_checkpoint=False)
    assert fresh.args.chat_date == "2026-02-02"
