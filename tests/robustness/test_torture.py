"""Killed at random moments and resumed, a run ends in the weights of one never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.robustness.torture import apart, try_cases
from tests.support import fuzzing


@pytest.mark.costly
@pytest.mark.parametrize(
    ("ranks", "kills", "cases"),
    [
        pytest.param(1, 5, 20, id="one process"),
        pytest.param(2, 3, 0, id="two", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(ranks, kills, cases, tmp_path):
    """`make torture` has 30 of each. In a process of its own: it forks."""
    command = [
        sys.executable,
        "-m",
        "tests.robustness.torture",
        f"--kills={kills}",
        f"--ranks={ranks}",
    ]
    command += [f"--cases={cases}", "--processes=1", f"--out={tmp_path / 'out.json'}"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{kills} kills on {ranks} process(es)" in done.stdout
    kill, *fuzz = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (kill["kills"], kill["ranks"]) == (kills, ranks)
    assert kill["largest_difference"] <= (0 if ranks == 1 else 1e-6)
    assert kill["runs_to_the_end"] >= 1
    assert [row["cases"] for row in fuzz] == [cases] * bool(cases)


def test_other_weights_are_noticed(tmp_path):
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    for name, change in (("one", 0.0), ("two", 1e-7)):
        (tmp_path / name).mkdir()
        changed = weights | {"a": weights["a"] + change}
        save_file(changed, tmp_path / name / "model.safetensors")
    assert apart(tmp_path / "one", tmp_path / "one") == 0
    assert apart(tmp_path / "one", tmp_path / "two") == pytest.approx(1e-7)


def test_a_case_that_ends_otherwise_is_shown(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", "restored after the test")
    monkeypatch.setattr(fuzzing, "run_case", lambda case, folder: {}["missing"])
    with pytest.raises(RuntimeError, match=r"(?s)KeyError: 'missing'.*attempt\("):
        try_cases(5, 0)
