"""The command line: a run from YAML to report, preflight, and one-line errors with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM
from widemargin.trainer.cli import main

from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, its tokenizer, data and a config."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    data = folder / "data"
    data.mkdir()
    tiny_pairs(12).to_json(data / "train.jsonl")
    tiny_pairs(5, seed=1).to_json(data / "test.jsonl")
    write_config(folder / "config.yaml", folder)
    return folder


def write_config(path: Path, folder: Path, **changes) -> str:
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset": str(folder / "data"),
        "objective": "lmpo",
        "beta": 2,
        "learning_rate": "1e-3",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "save_strategy": "no",
        "output_dir": str(path.parent / "run"),
        "use_cpu": True,
    }
    settings |= changes
    kept = {key: value for key, value in settings.items() if value is not ...}
    path.write_text(yaml.safe_dump(kept))
    return str(path)


def test_train_and_report(place, capsys):
    assert main(["train", str(place / "config.yaml"), "--margin_weight=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "train: 12 pairs" in printed
    assert "Report:" in printed
    assert "plan: 4 pairs a step" in printed
    assert "of padded tokens computed" in printed
    run = place / "run"
    notes = json.loads((run / "run.json").read_text())
    assert notes["objective"]["name"] == "lmpo"
    assert notes["objective"]["margin_weight"] == 0.1
    assert notes["summary"]["steps"] == 2
    assert notes["data"]["train"]["pairs"] == 12
    assert notes["plan"]["pairs_per_step"] == 4
    AutoModelForCausalLM.from_pretrained(run)
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_figures_are_shown_with_and_without_a_bar(place, tmp_path, capsys, disable_tqdm):
    config = write_config(tmp_path / "c.yaml", place, disable_tqdm=disable_tqdm)
    assert main(["train", config]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "training" in line] == ["1", "2"]
    assert [line.split()[1] for line in lines if "held out" in line] == ["0", "1", "2"]


def test_preflight_trains_nothing(place, capsys, tmp_path):
    config = write_config(tmp_path / "c.yaml", place)
    assert main(["train", config, "--seed", "3", "--preflight", "--profile", "--beta", "3.5"]) == 0
    printed = capsys.readouterr().out
    for expected in ("First pair", "beta: 3.5", "12 pairs", "plan: 4 pairs a step"):
        assert expected in printed
    assert not (tmp_path / "run").exists()


def test_resume_from_the_newest_checkpoint(place, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", place, save_strategy="steps", save_steps=1)
    assert main(["train", config, "--resume_from_checkpoint=true"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert main(["train", config]) == 0
    assert main(["train", config, "--max_steps=3", "--resume_from_checkpoint=true"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


BAD = [
    pytest.param({"learning_rte": 1}, "did you mean 'learning_rate'", id="unknown key"),
    pytest.param({"objective": "smpo"}, "did you mean 'simpo'", id="unknown objective"),
    pytest.param({"objective": ...}, "objective: none is named", id="no objective"),
    pytest.param({"beta": 0}, "beta", id="beta zero"),
    pytest.param({"beta": -1.5}, "beta", id="beta negative"),
    pytest.param({"beta": "big"}, "beta", id="beta text"),
    pytest.param({"margin_power": 4}, "margin_power", id="objective's own"),
    pytest.param({"objective_args": [1]}, "objective_args", id="arguments in a list"),
    pytest.param({"objective_args": {"beta": 1}}, "beta: given", id="beta twice"),
    pytest.param(
        {"objective_args": {"margin_weight": 1}, "margin_weight": 2}, "keep one", id="weight twice"
    ),
    pytest.param({"dataset": "missing.jsonl"}, "missing.jsonl", id="missing file"),
    pytest.param({"dataset": ...}, "dataset", id="no data"),
    pytest.param({"model_name_or_path": "/no/such/model"}, "no such folder", id="missing model"),
    pytest.param({"model_name_or_path": ...}, "model_name_or_path", id="no model"),
    pytest.param({"max_length": 0}, "max_length", id="length zero"),
    pytest.param({"eval_strategy": "sometimes"}, "sometimes", id="bad choice"),
    pytest.param({"head_tail": "mode"}, "head_tail", id="bad tail"),
    pytest.param({"per_device_train_batch_size": 0}, "per_device_train", id="batch of none"),
    pytest.param({"per_device_eval_batch_size": -1}, "per_device_eval", id="negative batch"),
    pytest.param({"learning_rate": -1}, "learning_rate", id="negative rate"),
    pytest.param({"learning_rate": ".nan"}, "learning_rate", id="rate not a number"),
    pytest.param({"adam_beta2": 1}, "adam_beta2", id="beta2 one"),
    pytest.param({"seed": -1}, "seed", id="negative seed"),
    pytest.param({"dataloader_num_workers": -1}, "dataloader_num_workers", id="negative workers"),
    pytest.param({"max_steps": 0}, "max_steps", id="no steps"),
    pytest.param({"max_steps": ..., "num_train_epochs": 0}, "num_train_epochs", id="no epochs"),
    pytest.param({"report_to": "nonsense"}, "report_to", id="unknown tracker"),
    pytest.param({"label_smoothing_factor": 0.1}, "label_smoothing", id="smoothing of tokens"),
    pytest.param({"auto_find_batch_size": True}, "gradient_accumulation", id="batch by trial"),
    pytest.param({"train_sampling_strategy": "group_by_length"}, "random", id="other order"),
    pytest.param({"metric_for_best_model": "acc"}, "rewards/accuracies", id="unknown metric"),
    pytest.param({"save_strategy": "best"}, "metric_for_best_model", id="best of nothing"),
    pytest.param({"accelerator_config": {"x": 1}}, "'x'", id="unknown in accelerator_config"),
    pytest.param({"accelerator_config": {"split_batches": True}}, "split_batches", id="split"),
    pytest.param({"eval_dataset": ..., "dataset_splits": ["train"]}, "eval_", id="no held-out"),
    pytest.param(
        {"dataset_splits": ["train"], "eval_strategy": "no"}, "eval_on_start", id="none at start"
    ),
    pytest.param({"dataset_splits": ["test"]}, "train split", id="no train split"),
    pytest.param({"output_dir": "/dev/null/run"}, "/dev/null", id="output under a file"),
    pytest.param({"output_dir": ""}, "output_dir: it is empty", id="no output"),
    pytest.param({"head_backend": "triton"}, "CUDA", id="triton on a CPU"),
    pytest.param({"dtype": "float8"}, "dtype", id="bad dtype"),
    pytest.param({"resume_from_checkpoint": "nowhere"}, "nowhere", id="missing checkpoint"),
]


@pytest.mark.parametrize("preflight", [[], ["--preflight"]], ids=["train", "preflight"])
@pytest.mark.parametrize(("changes", "named"), BAD)
def test_bad_settings(place, tmp_path, capsys, changes, named, preflight):
    config = write_config(tmp_path / "c.yaml", place, **changes)
    assert_one_line_error(["train", config, *preflight], named, capsys)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optim_args": "words"}, "optim"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs: "),
        ({"output_dir": "/proc/run"}, "/proc/run"),
    ],
)
def test_what_only_training_finds(place, tmp_path, capsys, changes, named):
    config = write_config(tmp_path / "c.yaml", place, **changes)
    assert_one_line_error(["train", config], named, capsys)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_weights_too_coarse_for_small_steps(place, tmp_path, capsys, dtype):
    config = write_config(tmp_path / "c.yaml", place, dtype=dtype, max_steps=1)
    for preflight in ([], ["--preflight"]):
        assert main(["train", config, *preflight]) == 0
        assert ("rounded away" in capsys.readouterr().out) == (dtype == "bfloat16")


def test_interrupted(place, monkeypatch, capsys):
    from widemargin.trainer.trainer import PreferenceTrainer

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PreferenceTrainer, "train", interrupt)
    assert main(["train", str(place / "config.yaml")]) == 130
    assert "resume_from_checkpoint" in capsys.readouterr().err
    monkeypatch.setattr("widemargin.trainer.cli.run_sweep", interrupt)
    assert main(["sweep", str(place / "config.yaml"), "--beta=1,2"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def assert_one_line_error(argv: list[str], named: str, capsys) -> None:
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert named in lines[-1]


def test_missing_and_broken_config(tmp_path, capsys):
    assert_one_line_error(["train", str(tmp_path / "none.yaml")], "none.yaml", capsys)
    for text in (
        "a: [1, 2",
        "just words",
        "- 1\n- 2",
        "!!python/object/apply:os.system ['true']",
        "a: 1\nb: 2\na: 3",
    ):
        (tmp_path / "bad.yaml").write_text(text)
        assert_one_line_error(["train", str(tmp_path / "bad.yaml")], "bad.yaml", capsys)
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert_one_line_error(["train", str(tmp_path / "bad.yaml")], "UTF-8", capsys)


def test_bad_rows(place, tmp_path, capsys):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "a", "answer": "b"}\n')
    unusable = tmp_path / "unusable.jsonl"
    unusable.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3)
    for path, named in ((wrong, "question"), (unusable, "identical")):
        config = write_config(tmp_path / "c.yaml", place, dataset=str(path), eval_strategy="no")
        assert_one_line_error(["train", config], named, capsys)


def test_tokenizer_larger_than_the_model(place, tmp_path, capsys):
    tiny_model(vocab_size=20).save_pretrained(tmp_path / "small")
    TOKENIZER.save_pretrained(tmp_path / "small")
    config = write_config(tmp_path / "c.yaml", place, model_name_or_path=str(tmp_path / "small"))
    assert_one_line_error(["train", config], "vocabulary", capsys)
    assert_one_line_error(["train", config, "--preflight"], "vocabulary", capsys)


def test_names_that_no_file_can_have(place, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", place)
    for setting in ("model_name_or_path", "dataset", "output_dir"):
        assert_one_line_error(["train", config, f"--{setting}={'a' * 5000}"], "too long", capsys)


def test_bad_arguments(place, capsys):
    config = str(place / "config.yaml")
    assert_one_line_error(["train", config, "beta=2"], "beta=2", capsys)
    assert_one_line_error(["train", config, "--beta"], "--beta", capsys)
    assert_one_line_error(["train", config, "\u2014beta=2"], "\u2014beta", capsys)
    unset = "--ref_model_name_or_path=: give a value, or --ref_model_name_or_path=null"
    assert_one_line_error(["train", config, "--ref_model_name_or_path="], unset, capsys)
    assert_one_line_error(["report", str(place), "--nonsense=1"], "nonsense", capsys)
    assert_one_line_error(["report", str(place / "model")], "model", capsys)


def test_report_where_it_cannot_be_written(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    assert_one_line_error(["report", str(tmp_path), "--out", str(tmp_path)], "cannot be", capsys)


@pytest.mark.costly
def test_as_a_module(place, tmp_path):
    """The launchers' form; a mistake ends in exit code 2, without a traceback."""
    command = [sys.executable, "-m", "widemargin.trainer", str(place / "config.yaml"), "--beta=-1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().startswith("error: beta")


def test_help_is_quick_and_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("train", "report", "quickstart"))
    code = "import sys, widemargin.trainer.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_output_folder_that_is_no_text_is_refused(place, capsys):
    """It would have ended the run at its first checkpoint."""
    assert main(["train", str(place / "config.yaml"), "--output_dir=out\udcff"]) == 2
    assert "error: output_dir: out\\udcff: name a folder in UTF-8" in capsys.readouterr().err


@pytest.mark.costly
def test_names_in_a_process_of_another_encoding(place, tmp_path):
    """A locale that is not UTF-8, as LC_ALL=C is not where Python may not make it so."""
    config = write_config(tmp_path / "config.yaml", place, output_dir="\u00f6ut")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "widemargin.trainer", config]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, check=False, env=os.environ | plain
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: output_dir: \\xf6ut: name a folder in UTF-8")
