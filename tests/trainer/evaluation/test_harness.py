"""The Language Model Evaluation Harness: a local task, and the leaderboards' lists."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from widemargin.trainer.cli import main
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation import harness
from widemargin.trainer.evaluation.harness import LEADERBOARDS, Task

from tests.support.eval_files import save_model
from tests.trainer.test_cli import assert_one_line_error

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(
    not INSTALLED, reason="lm-eval is not installed (it is in the eval extra; make test-eval)"
)

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}, train: {data}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def test_the_leaderboards_tasks_and_shots():
    first = {task.name: task.shots for task in LEADERBOARDS["leaderboard-v1"]}
    assert first == {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
    }
    assert LEADERBOARDS["leaderboard-v2"] == (Task("leaderboard"),)


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert_one_line_error(["evaluate", "lm-eval", "--model", "m"], "widemargin[eval]", capsys)


@pytest.mark.parametrize("argument", ["--batch_size=0", "--num_fewshot=-1", "--shots=3"])
def test_bad_settings(argument, capsys):
    command = ["evaluate", "lm-eval", "--model", "m", argument]
    assert_one_line_error(command, argument[2:5], capsys)


def test_average_of_leaderboard_v1():
    tasks = LEADERBOARDS["leaderboard-v1"]
    scores = {t.name: {t.name: {t.metric: 0.1 * i}} for i, t in enumerate(tasks, 1)}
    assert harness._average(tasks, scores) == pytest.approx(35)
    scores["gsm8k"] = {"gsm8k": {"exact_match,flexible-extract": 0.5}}
    assert harness._average(tasks, scores) is None


def local_tasks(folder: Path) -> Path:
    """A folder with two small tasks."""
    folder.mkdir()
    data = folder / "data.json"
    rows = [
        {"question": f"Is {word} wet?", "choices": ["yes", "no"], "label": i % 2}
        for i, word in enumerate(["water", "Paris", "sand", "rain"])
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("wet_one", "wet_two"):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    return folder


@needs_harness
def test_local_tasks_and_going_on_after_them(tmp_path, monkeypatch, capsys):
    tasks = local_tasks(tmp_path / "tasks")
    command = ["evaluate", "lm-eval", "--model", save_model(tmp_path / "m"), "--device=cpu"]
    command += ["--tasks", "wet_one,wet_two", "--include-path", str(tasks)]
    command += ["--out", str(tmp_path / "out"), "--num_fewshot=1"]
    assert main(command) == 0
    result = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    for name in ("wet_one", "wet_two"):
        assert 0 <= result["scores"][name][name]["acc,none"] <= 1
    assert "wet_two" in capsys.readouterr().out
    path = tmp_path / "out" / "tasks.jsonl"
    first, _ = path.read_text().splitlines(keepends=True)
    path.write_text(first)
    ran = []
    run_task = harness._run_task
    monkeypatch.setattr(harness, "_run_task", lambda t, *a: ran.append(t.name) or run_task(t, *a))
    assert main(command) == 0
    assert ran == ["wet_two"]
    assert json.loads((tmp_path / "out" / "lm_eval.json").read_text()) == result
    assert_one_line_error([*command, "--limit", "2"], "limit: None before", capsys)


@needs_harness
def test_the_leaderboards_tasks_are_the_harness_s(tmp_path):
    every = tuple(task for tasks in LEADERBOARDS.values() for task in tasks)
    with pytest.raises(UserError, match="has no wet_three;"):
        harness._task_manager((*every, Task("wet_three")), tmp_path)
