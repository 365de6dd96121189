"""Variables that launchers leave, and a meeting of processes to which nobody comes."""

from __future__ import annotations

import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings.launch import PLACES, check_left_over, check_place, check_together

WHOLE = dict(zip(PLACES, ("2", "0", "0", "127.0.0.1", "29500"), strict=True))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*PLACES, "ACCELERATE_USE_FSDP", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        pytest.param({}, 1, id="none"),
        pytest.param({"WORLD_SIZE": "1", "RANK": "0"}, 1, id="a pod of one"),
        pytest.param(WHOLE, 2, id="torchrun's"),
    ],
)
def test_the_number_of_processes(given, ranks, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert check_place() == ranks


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"WORLD_SIZE": "2"}, "unset WORLD_SIZE=2.*MASTER_ADDR", id="size"),
        pytest.param({"RANK": "1"}, "unset RANK=1", id="rank"),
        pytest.param({"LOCAL_RANK": "0"}, "unset LOCAL_RANK=0", id="local rank"),
        pytest.param(
            {k: v for k, v in WHOLE.items() if k != "LOCAL_RANK"}, "LOCAL_RANK not set", id="pods"
        ),
        pytest.param(WHOLE | {"RANK": "2"}, "RANK below WORLD_SIZE", id="beyond"),
        pytest.param(WHOLE | {"WORLD_SIZE": "x"}, "whole numbers", id="no number"),
        pytest.param(WHOLE | {"MASTER_PORT": "99999"}, "a port", id="port"),
    ],
)
def test_a_part_of_a_launch_is_refused(given, message, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_place()


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_TORCH_DEVICE", "cuda")],
)
def test_what_an_earlier_launch_left(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"unset {name}"):
        check_left_over()


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("rank", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_nobody_else_comes(rank, tmp_path):
    """In a process of its own, whose group would outlive the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import os, sys; from widemargin.trainer.settings import launch\n"
        "launch.SAY_AFTER_S = 0.1\n"
        f"os.environ.update({WHOLE | {'RANK': rank, 'MASTER_PORT': str(port)}!r})\n"
        "from widemargin.trainer import PreferenceConfig\n"
        "PreferenceConfig(objective='simpo', use_cpu=True, ddp_timeout=3, output_dir=sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: start all processes, or unset WORLD_SIZE" in last
    assert f"MASTER_PORT={port}; this is RANK={rank}" in last
    assert "Waits for 2 processes (WORLD_SIZE)" in done.stderr


def test_processes_that_would_each_train_alone_are_refused():
    """As accelerate has it on a machine without a GPU, unless use_cpu is set."""
    alone: Any = SimpleNamespace(world_size=1)
    with pytest.raises(UserError, match=r"use_cpu: set it to true; .* each of the 2 processes"):
        check_together(alone, 2)
    check_together(alone, 1)
