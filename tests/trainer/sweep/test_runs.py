"""Runs of a sweep: carried out, skipped, stopped, failed and compared; training has a stand-in."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from widemargin.trainer.cli import main
from widemargin.trainer.monitor.history import load_run
from widemargin.trainer.sweep.runs import is_finished

from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs

STAND_IN = """
import json, sys
from pathlib import Path
config, *overrides = sys.argv[1:]
settings = dict(each.removeprefix("--").split("=", 1) for each in overrides)
folder = Path(settings.pop("output_dir"))
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "calls", "a") as calls:
    calls.write(json.dumps([config, settings]) + "\\n")
status = Path(config).with_name("status-" + settings["beta"])
if status.exists():
    sys.exit(int(status.read_text()))
log = [{"step": 3, "eval_rewards/accuracies": 0.5, "eval_loss": float(settings["beta"])}]
(folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
notes = {"settings": settings, "summary": {"steps": 3}}
(folder / "run.json").write_text(json.dumps(notes))
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Any:
    """Calls the command with a launcher that only writes what a finished run leaves."""
    (tmp_path / "train.py").write_text(STAND_IN)
    (tmp_path / "c.yaml").write_text(f"objective: simpo\noutput_dir: {tmp_path / 'out'}\n")
    launcher = shlex.join([sys.executable, str(tmp_path / "train.py")])

    def call(*arguments: str) -> int:
        return main(["sweep", str(tmp_path / "c.yaml"), f"--launcher={launcher}", *arguments])

    return call


def calls(folder: Path, name: str) -> list[dict[str, str]]:
    lines = (folder / "out" / "sweep" / name / "calls").read_text().splitlines()
    return [json.loads(line)[1] for line in lines]


def test_every_combination_runs_once_and_they_are_compared(
    tmp_path: Path, sweep: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--learning_rate", "5e-7,1e-6", "--beta", "2,2.5", "--seed=3") == 0
    for rate in ("5e-7", "1e-6"):
        for beta in ("2", "2.5"):
            (settings,) = calls(tmp_path, f"learning_rate-{rate}_beta-{beta}")
            assert settings == {
                "learning_rate": rate, "beta": beta, "seed": "3", "resume_from_checkpoint": "auto",
            }  # fmt: skip
    printed = capsys.readouterr().out
    assert "4 settings: held-out accuracy" in printed
    report = tmp_path / "out" / "sweep" / "report.html"
    assert f"Report: {report}" in printed
    assert "learning_rate" in report.read_text()
    assert sweep("--learning_rate", "5e-7,1e-6", "--beta", "2,2.5,3", "--seed=3") == 0
    assert len(calls(tmp_path, "learning_rate-5e-7_beta-2")) == 1
    assert len(calls(tmp_path, "learning_rate-5e-7_beta-3")) == 1
    assert capsys.readouterr().out.count("it has finished already") == 4


def test_a_failed_run_is_named_and_the_others_go_on(
    tmp_path: Path, sweep: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "status-2").write_text("7")
    assert sweep("--beta=2,3") == 1
    printed = capsys.readouterr()
    assert "Failed: 1 of 2 runs\n  beta-2  exit status 7 after" in printed.err
    assert "Report:" in printed.out
    (tmp_path / "status-2").unlink()
    assert sweep("--beta=2,3") == 0
    assert (len(calls(tmp_path, "beta-2")), len(calls(tmp_path, "beta-3"))) == (2, 1)


def test_a_launcher_that_does_not_wait_is_said(
    tmp_path: Path, sweep: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "status-2").write_text("0")
    assert sweep("--beta=2,3") == 1
    err = capsys.readouterr().err
    assert re.search("beta-2  exit status 0 after .*, without a finished run in its folder", err)


def test_all_failed(tmp_path: Path, sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for beta in "23":
        (tmp_path / f"status-{beta}").write_text("2")
    assert sweep("--beta=2,3") == 1
    printed = capsys.readouterr()
    assert "Failed: 2 of 2 runs" in printed.err
    assert "Report" not in printed.out


@pytest.mark.parametrize("status", [143, 130])
def test_a_stopped_run_stops_the_sweep(
    tmp_path: Path, sweep: Any, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "status-2").write_text(str(status))
    assert sweep("--beta=2,3") == status
    assert "beta-2 was stopped; the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out" / "sweep" / "beta-3").exists()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["--beta=2,3", "--seed=4"], "another seed"),
        (["--learning_rate=1e-6,2e-6"], "a sweep over beta"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(
    sweep: Any, capsys: pytest.CaptureFixture[str], second: list[str], message: str
) -> None:
    assert sweep("--beta=2,3", "--seed=3") == 0
    capsys.readouterr()
    assert sweep(*second) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"varied', '{"method": "grid"}', "[]"])
def test_a_folder_with_another_sweep_json_is_refused(
    tmp_path: Path, sweep: Any, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "sweep.json").write_text(content)
    assert sweep("--beta=2,3", f"--out={tmp_path}") == 2
    assert "error: --out: name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "message"), [("bash -c 'x", "close its quot"), ("nosuchtool x", "install nosuch")]
)
def test_a_launcher_that_cannot_start_is_refused_before_anything_is_written(
    tmp_path: Path, sweep: Any, capsys: pytest.CaptureFixture[str], launcher: str, message: str
) -> None:
    assert sweep("--beta=2,3", f"--launcher={launcher}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_hyperparameters_are_refused_before_the_first_run(
    tmp_path: Path, sweep: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--launcher=", "--objective_args={gama: 1}", "--beta=2,3", "--use_cpu=true"]
    assert sweep(*arguments) == 2
    assert "'gama' is not known" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_summary_or_with_a_claim_has_not_finished(tmp_path: Path) -> None:
    assert not is_finished(tmp_path)
    (tmp_path / "run.json").write_text('{"summary": {}}')
    assert not is_finished(tmp_path)
    (tmp_path / "run.json").write_text('{"summary": {"steps": 3}}')
    assert is_finished(tmp_path)
    (tmp_path / ".running").write_text("{}")
    assert not is_finished(tmp_path)


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bet=2,3"], "beta"),
        (["--beta=2,x"], "beta: "),
        (["--output_dir=a,b"], "--out names the folder"),
        (["--output_dir=a", "--beta=1,2"], "--out names the folder"),
    ],
)
def test_settings_are_refused_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "c.yaml").write_text("objective: simpo\nuse_cpu: true\n")
    out = tmp_path / "out"
    assert main(["sweep", str(tmp_path / "c.yaml"), f"--out={out}", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_training_itself(tmp_path: Path) -> None:
    """Two runs of two steps, of which one was interrupted after its first."""
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    tiny_pairs(12).to_json(tmp_path / "data" / "train.jsonl")
    settings = {
        "model_name_or_path": str(tmp_path / "model"), "dataset": str(tmp_path / "data"),
        "objective": "simpo", "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1,
        "save_steps": 1, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    first = out / "beta-2"
    assert main(["train", str(config), "--beta=2", f"--output_dir={first}"]) == 0
    for path in ("run.json", "checkpoint-2/manifest.json"):
        (first / path).unlink()
    assert main(["sweep", str(config), f"--out={out}", "--beta=2,2.5"]) == 0
    notes = json.loads((first / "run.json").read_text())
    assert notes["summary"]["steps"] == 2
    assert [step for step, _ in load_run(out / "beta-2.5").series("loss")] == [1, 2]
    assert (out / "report.html").is_file()
