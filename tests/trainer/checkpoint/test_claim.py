"""One run at a time in a folder, and whose checkpoints lie there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from widemargin.trainer.checkpoint.files import (
    choose_checkpoint,
    newest_complete,
    rotate,
    write_manifest,
)
from widemargin.trainer.checkpoint.resume import CLAIM, claimed, last_run, name_run
from widemargin.trainer.errors import UserError

from tests.support.tiny_models import tiny_trainer

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
CLAIMING = f"""
import sys
from {claimed.__module__} import claimed
from {UserError.__module__} import UserError
try:
    with claimed(sys.argv[1]):
        print("claimed")
except UserError as error:
    print(error)
"""


def claim_elsewhere(folder: Path) -> str:
    command = [sys.executable, "-c", CLAIMING, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_one_run_at_a_time(tmp_path, preloaded):
    with claimed(tmp_path):
        name_run(tmp_path, "a" * 40)
        name_run(tmp_path, "b")
        assert last_run(tmp_path) == "b"
        assert "wait for the run that uses" in claim_elsewhere(tmp_path)
        with claimed(tmp_path):  # the same process may
            pass
        assert "wait for the run that uses" in claim_elsewhere(tmp_path)
    assert not list(tmp_path.iterdir())
    assert claim_elsewhere(tmp_path) == "claimed"


def test_a_run_that_stops_leaves_its_id(tmp_path, preloaded):
    def stops() -> None:
        with claimed(tmp_path):
            name_run(tmp_path, "one")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stops()
    assert last_run(tmp_path) == "one"
    assert claim_elsewhere(tmp_path) == "claimed"


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 5000, '"\\ud800"'])
def test_a_damaged_note_is_none(tmp_path, content):
    (tmp_path / CLAIM).write_text(content)
    assert last_run(tmp_path) is None


def checkpoint(folder: Path, step: int, run: str, started: float) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights").write_text(run)
    write_manifest(path, step, {"id": run, "started": started})
    return path


def test_auto_takes_no_earlier_runs_checkpoint(tmp_path, caplog):
    for step in (2, 6, 8):
        checkpoint(tmp_path, step, "old", 1.0)
    checkpoint(tmp_path, 4, "new", 2.0)
    assert choose_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-4"
    assert newest_complete(tmp_path, run="old")[0] == tmp_path / "checkpoint-8"
    assert choose_checkpoint("auto", tmp_path, run="newer, killed before it saved") is None
    assert "checkpoint-8: it is of an earlier run" in caplog.text
    with pytest.raises(UserError, match="of an earlier run"):
        choose_checkpoint(True, tmp_path, run="newer, killed before it saved")
    (tmp_path / "checkpoint-4" / "weights").write_text("damaged")
    with pytest.raises(UserError, match="checkpoint-4: weights has"):
        choose_checkpoint("auto", tmp_path, run="new")


def test_earlier_runs_go_first_whatever_their_times(tmp_path):
    for step in (6, 8):
        checkpoint(tmp_path, step, "old", 1.0)
    for step in (2, 4):
        checkpoint(tmp_path, step, "new", 2.0)
    (tmp_path / "checkpoint-8" / "weights").touch()
    rotate(tmp_path, 3, keep=[])
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-2", "checkpoint-4"}


def test_a_run_goes_on_under_its_id(tmp_path):
    tiny_trainer(tmp_path, **SAVING).train()
    again = tiny_trainer(tmp_path, **SAVING | {"max_steps": 5})
    again.train(resume_from_checkpoint="auto")
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-5"
    runs = {name: _run(tmp_path / f"checkpoint-{name}") for name in (1, 3, 5)}
    assert len(set(runs.values())) == 1
    tiny_trainer(tmp_path, **SAVING).train()
    assert _run(tmp_path / "checkpoint-1") != runs[5]
    assert newest_complete(tmp_path)[0] == tmp_path / "checkpoint-3"


def _run(folder: Path) -> str | None:
    from widemargin.trainer.checkpoint.files import run_of

    return run_of(folder)
