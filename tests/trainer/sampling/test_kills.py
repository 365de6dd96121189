"""Killed at random moments and continued is uninterrupted, byte for byte."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from widemargin.trainer.cli import main

from tests.support.eval_files import save_model
from tests.support.sampling import generate, prompts_file

ROOT = Path(__file__).resolve().parents[3]
RULE = """
import time

def length(prompt, answer, row):
    time.sleep(0.002)
    return len(answer) + row["gold"]
"""
KILLS = [pytest.param(3, marks=pytest.mark.costly), pytest.param(10, marks=pytest.mark.slow)]


def kill(arguments: list[str], grown: Path, total: int, kills: int, folder: Path) -> None:
    """Run the command, killed as often, until it ends; some kills have cut it short."""
    sizes = sorted(random.Random(kills).sample(range(1, total), kills))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    driver = [sys.executable, "-m", "tests.support.killing"]
    done = subprocess.run(
        [*driver, json.dumps([arguments, str(grown), sizes])],
        check=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert sum(size < total for size in seen) >= kills // 2 + 1
    assert seen[-1] == total


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("kills", KILLS)
def test_killed_is_uninterrupted(tmp_path, kills, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "length_rule.py").write_text(RULE)
    model, source = save_model(tmp_path / "model"), prompts_file(tmp_path)
    cut, intact = tmp_path / "cut", tmp_path / "intact"

    def answers(out: Path) -> list[str]:
        return generate(model, source, out, "--n", "5", "--batch_size=1")

    def scores(out: Path) -> list[str]:
        named = ["--by", "python:length_rule:length", "--name", "length"]
        return ["score", str(out), *named, "--batch_size=1"]

    for command, name in ((answers, "answers.jsonl"), (scores, "scores-length.jsonl")):
        assert main(command(intact)) == 0
        total = (intact / name).stat().st_size
        kill(command(cut), cut / name, total, kills, tmp_path)
    for name in ("prompts.jsonl", "answers.jsonl", "scores-length.jsonl"):
        assert (cut / name).read_bytes() == (intact / name).read_bytes()
    for out in (cut, intact):
        assert main(["pair", str(out), "--out", str(out / "pairs.jsonl"), "--keep-unfinished"]) == 0
    assert (cut / "pairs.jsonl").read_bytes() == (intact / "pairs.jsonl").read_bytes()
