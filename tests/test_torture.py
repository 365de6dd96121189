"""Killed at random moments and resumed, a run ends in the weights of one never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("ranks", "kills"),
    [pytest.param(1, 5, id="one process"), pytest.param(2, 3, id="two", marks=pytest.mark.slow)],
)
def test_killed_and_resumed(ranks, kills):
    """`make torture` has 30 of each. In a process of its own: it forks."""
    command = [sys.executable, "-m", "bench.torture", f"--kills={kills}", f"--ranks={ranks}"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{kills} kills on {ranks} process(es)" in done.stdout
