"""Killed at random moments and resumed, a run ends in the weights of one never stopped."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import config as datasets_config
from safetensors.torch import save_file

from tests.robustness.torture import KINDS, SHARES, apart, runnable, try_cases
from tests.support import fuzzing, spoilt_files


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize(
    ("kind", "kills", "cases"),
    [
        pytest.param("plain", 2, 50, id="one process"),
        pytest.param("lora", 3, 0, id="adapter, the best kept", marks=pytest.mark.slow),
        pytest.param("reference", 3, 0, id="reference", marks=pytest.mark.slow),
        pytest.param("ddp", 3, 0, id="two", marks=pytest.mark.slow),
        pytest.param("zero2", 3, 0, id="ZeRO-2", marks=pytest.mark.slow),
        pytest.param("fsdp2", 3, 0, id="FSDP2", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(kind, kills, cases, tmp_path):
    """`make torture` has 12 of each. In a process of its own: it forks."""
    if kind not in runnable():
        pytest.skip("deepspeed is not installed; make test-distributed installs it")
    ranks, _ = KINDS[kind]
    command = [
        sys.executable,
        "-m",
        "tests.robustness.torture",
        f"--kills={kills}",
        f"--kinds={kind}",
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
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", "restored after the test")
    monkeypatch.setattr(fuzzing, "run_case", lambda case, folder: {}["missing"])
    with pytest.raises(RuntimeError, match=r"(?s)KeyError: 'missing'.*attempt\("):
        try_cases("rows", 5, 0)


@pytest.fixture(scope="module")
def elsewhere():
    """A process for what a library may crash."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("kind", [name for name in SHARES if name != "rows"])
def test_spoilt_files(kind, elsewhere):
    outcomes = elsewhere.submit(try_cases, kind, 20, 7).result(timeout=600)
    assert outcomes.total() == 20


def test_what_takes_too_long_or_too_much_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(spoilt_files, "WAIT_S", 1)
    monkeypatch.setitem(spoilt_files.KINDS, "edges", lambda random, folder: time.sleep(5))
    with pytest.raises(spoilt_files.OutOfBounds, match="not done after 1 s"):
        spoilt_files.try_case("edges", 0, tmp_path)
    monkeypatch.setattr(spoilt_files, "MEMORY_BYTES", 2**20)
    monkeypatch.setitem(spoilt_files.KINDS, "edges", lambda random, folder: str(len(b"x" * 2**26)))
    with pytest.raises(spoilt_files.OutOfBounds, match="MiB"):
        spoilt_files.try_case("edges", 0, tmp_path)
