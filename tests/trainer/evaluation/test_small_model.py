"""Every evaluation on the small real model and the benchmarks' own questions, without network."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from widemargin.trainer.cli import main

from tests.support.eval_files import REAL, real_file
from tests.trainer.evaluation.test_harness import local_tasks

MODEL = REAL.parent / "small_lm"
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason=f"{MODEL} is not here")
KILLED = """
import os, signal, sys
from widemargin.trainer.cli import main
from widemargin.trainer.evaluation.results import Records

append = Records.append

def append_and_die(self, records):
    append(self, records)
    if len(self.done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

Records.append = append_and_die
main(sys.argv[1:])
"""
"""The command line, in a process that dies once three answers are written."""
ARENA = [("v0.1", "arena-hard-v0.1"), ("v2.0", "arena-hard-v2.0")]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def answers(benchmark: str, questions: str, out: Path, *more: str) -> list[str]:
    """The command line of a short run."""
    options = ["--model", str(MODEL), "--questions", real_file(questions), "--out", str(out)]
    return ["evaluate", benchmark, *options, "--max_new_tokens=8", "--device=cpu", *more]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_a_run_that_is_killed_goes_on_with_nothing_lost_or_doubled(tmp_path):
    """Sampled, so that another batch or seed would show."""
    sampled = ("--limit=6", "--batch_size=1", "--temperature=1")
    whole = answers("alpaca-eval", "alpaca_eval_instructions.json.gz", tmp_path / "whole", *sampled)
    assert main(whole) == 0
    cut = answers("alpaca-eval", "alpaca_eval_instructions.json.gz", tmp_path / "cut", *sampled)
    path = tmp_path / "cut" / "answers.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED, *cut], check=False, timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert len(rows(path)) == 3
    assert not (tmp_path / "cut" / "model_outputs.json").exists()
    assert main(cut) == 0
    assert sorted(row["id"] for row in rows(path)) == [str(i) for i in range(6)]
    names = [folder / "model_outputs.json" for folder in (tmp_path / "cut", tmp_path / "whole")]
    assert names[0].read_text() == names[1].read_text()


@pytest.mark.parametrize(("name", "version"), ARENA)
def test_arena_hard(tmp_path, name, version):
    command = answers("arena-hard", f"arena_hard_{name}_question.jsonl.gz", tmp_path, "--limit=2")
    assert main(command) == 0
    written = rows(tmp_path / version / "model_answer" / "small_lm.jsonl")
    assert len(written) == 2
    assert all(row["messages"][-1]["content"]["answer"] for row in written)


def test_pairs(tmp_path, capsys):
    data = real_file("../judged_pairs_test.jsonl.gz")
    command = ["evaluate", "pairs", "--model", str(MODEL), "--dataset", data, "--device=cpu"]
    limits = ["--max-pairs=4", "--max_length=96", "--max_prompt_length=48"]
    assert main([*command, *limits, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "pairs.json").read_text())
    assert result["pairs"] == 4
    assert -15 < result["mean_logps"]["chosen"] < -1
    assert "calibration error" in capsys.readouterr().out


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed; make test-eval")
def test_lm_eval(tmp_path):
    command = ["evaluate", "lm-eval", "--model", str(MODEL), "--device=cpu", "--tasks=wet_one"]
    folder = local_tasks(tmp_path / "tasks")
    assert main([*command, "--include-path", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "lm_eval.json").is_file()
