"""The quickstart around training, which a stand-in for the command's training replaces here."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from widemargin.trainer import cli
from widemargin.trainer.errors import UserError
from widemargin.trainer.quickstart import command as quickstart
from widemargin.trainer.quickstart.data import Pair

CONFIG: dict[str, Any] = yaml.safe_load(
    (files("widemargin.configs") / "train" / "quickstart.yaml").read_text(encoding="utf-8")
)


@pytest.fixture
def command_lines(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A training that only copies the model and writes a log; the arguments of each call."""
    called: list[list[str]] = []

    def train(config: str, overrides: list[str]) -> int:
        called.append([config, *overrides])
        if "--fail=true" in overrides:
            raise UserError("fail: it does")
        options = dict(arg.removeprefix("--").split("=", 1) for arg in overrides)
        shutil.copytree(options["model_name_or_path"], options["output_dir"])
        logs = [
            {"step": 0, "eval_rewards/accuracies": 0.5},
            {"step": 9, "eval_rewards/accuracies": 0.9, "train_runtime": 3.0},
        ]
        run_dir = Path(options["output_dir"])
        (run_dir / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
        (run_dir / "run.json").write_text(json.dumps({"summary": {"kept": 1}}))
        return 0

    monkeypatch.setattr(cli, "_train", train)
    monkeypatch.setattr(quickstart, "SCORED_PROMPTS", 4)
    return called


def test_it_trains_as_the_train_command_does_and_reports(
    tmp_path: Path, command_lines: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quickstart", f"--folder={tmp_path}", "--seed=3", "--max_steps=9"]) == 0
    ((config, *overrides),) = command_lines
    assert config.endswith("quickstart.yaml")
    assert overrides == [
        "--seed=3",
        f"--model_name_or_path={tmp_path / 'model'}",
        f"--dataset={tmp_path / 'data'}",
        f"--output_dir={tmp_path / 'run'}",
        "--max_steps=9",
    ]
    printed = capsys.readouterr().out
    assert "Right answers to 4 held-out prompts: 0 -> 0" in printed
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in printed
    following = printed.partition("Next: ")[2].split("\n")
    assert f"--max_steps=9 --beta=4 --output_dir={tmp_path}/beta-4" in following[0]
    assert following[1].strip() == f"widemargin report {tmp_path}/run {tmp_path}/beta-4"
    notes = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert notes["summary"]["kept"] == 1
    assert [set(sample) for sample in notes["samples"]] == [{"prompt", "before", "after"}] * 3
    assert "before training" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_failed_training_ends_it(tmp_path: Path, command_lines: list[list[str]]) -> None:
    assert cli.main(["quickstart", f"--folder={tmp_path}", "--fail=true"]) == 2
    assert not (tmp_path / "run").exists()


def test_arguments_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected --key=value"):
        quickstart.quickstart(tmp_path / "out", 0, ["elsewhere"], lambda *_: 0)
    assert not (tmp_path / "out").exists()


def test_the_config_names_what_the_quickstart_writes() -> None:
    folder = quickstart.DEFAULT_FOLDER
    assert CONFIG["model_name_or_path"] == (folder / "model").as_posix()
    assert CONFIG["dataset"] == (folder / "data").as_posix()
    assert CONFIG["output_dir"] == (folder / "run").as_posix()
    assert CONFIG["objective"] == "lmpo"
    assert CONFIG["save_strategy"] == "no"
    assert isinstance(CONFIG["learning_rate"], float)


def test_right_answers_are_counted_by_text() -> None:
    pairs = [Pair("addition", "wrong", "1 + 1 = ?", "It is 2.", "It is 3.")] * 3
    assert quickstart.count_right(pairs, [" It is 2.\n", "It is 2", "It is 3."]) == 1
