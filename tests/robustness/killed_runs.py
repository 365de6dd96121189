"""Forked processes that train until their end, or until one of them is killed at a moment.

A moment is one event of one kind (a step, a save, an evaluation): a callback of the training loop,
or a file opened, renamed or removed in the output folder. The process tells its parent when it gets
there and is killed (SIGKILL) up to a few milliseconds later. Forks spare the imports.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 300


@dataclass(frozen=True)
class Moment:
    """The ``count``-th event of a kind in one rank's process, and how long after it."""

    phase: str
    count: int
    rank: int
    delay_s: float


class Events:
    """Counts the events of this process, and tells the parent when the moment has come."""

    def __init__(self, folder: Path, moment: Moment | None, pipe: int) -> None:
        self.folder, self.moment, self.pipe = str(folder.resolve()), moment, pipe
        self.counts: Counter[str] = Counter()

    def __call__(self, phase: str) -> None:
        self.counts[phase] += 1
        if self.moment is not None and (phase, self.counts[phase]) == (
            self.moment.phase, self.moment.count,
        ):  # fmt: skip
            os.write(self.pipe, b"x")

    def audit(self, event: str, args: Any) -> None:
        if event == "open":
            written = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if not written or not isinstance(args[0], str | os.PathLike):
                return
        elif event not in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            return
        if isinstance(args[0], str | os.PathLike) and self.folder in os.path.abspath(args[0]):
            self("save")


def train_here(place: Path, folder: Path, kind: str, events: Events) -> None:
    """One process' training in ``folder``, from whatever is there."""
    from transformers import TrainerCallback
    from widemargin.trainer.settings.files import load_config
    from widemargin.trainer.train import train
    from widemargin.trainer.trainer import PreferenceTrainer

    class Telling(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            events("step")

        on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_step_begin

        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            events("evaluate")

        on_evaluate = on_prediction_step

    original = PreferenceTrainer.train

    def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Telling())
        return original(self, *args, **kwargs)

    PreferenceTrainer.train = telling
    os.chdir(place)
    sys.addaudithook(events.audit)
    train(load_config(place / f"config-{kind}.yaml", [f"--output_dir={folder}"]))


def prepare_engine(kind: str) -> None:
    """What a launcher would do for an engine, and what lets it run on a CPU."""
    from tests.support.distributed_runs import (
        leave_collectives_to_gloo,
        take_the_cpu_for_an_accelerator,
    )

    if kind == "fsdp2":
        take_the_cpu_for_an_accelerator()
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_OFFLOAD_PARAMS": "false",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        }  # fmt: skip
    if kind == "zero2":
        leave_collectives_to_gloo()


def fork(
    place: Path, folder: Path, kind: str, rank: int, ranks: int, port: int, moment: Moment | None
) -> tuple[int, int]:
    """A process that trains; its id, and the pipe on which it tells of the moment."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        log = os.open(f"{folder}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        if ranks > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        mine = moment if moment is not None and moment.rank == rank else None
        prepare_engine(kind)
        train_here(place, folder, kind, Events(folder, mine, writing))
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def run(place: Path, folder: Path, kind: str, ranks: int, moment: Moment | None) -> bool:
    """Train until the end (True) or the moment (False, all killed)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(place, folder, kind, rank, ranks, port, moment) for rank in range(ranks)]
    watched = children[moment.rank if moment else 0]
    if not select.select([watched[1]], [], [], TIMEOUT_S)[0]:
        for child, _ in children:  # which makes each write down where it is
            os.kill(child, signal.SIGABRT)
            os.waitpid(child, 0)
        raise SystemExit(f"{folder}: no end after {TIMEOUT_S} s:\n{_end_of(folder)}")
    told = os.read(watched[1], 1)
    if told:
        assert moment is not None
        time.sleep(moment.delay_s)
        os.kill(watched[0], signal.SIGKILL)
        time.sleep(0.01 * (ranks > 1))
    for child, _ in children if told else ():
        if child != watched[0]:
            os.kill(child, signal.SIGKILL)
    statuses = [os.waitpid(child, 0)[1] for child, _ in children]
    for _, pipe in children:
        os.close(pipe)
    if not told and any(statuses):
        raise SystemExit(f"a run failed by itself, statuses {statuses}:\n{_end_of(folder)}")
    return not told


def _end_of(folder: Path) -> str:
    return Path(f"{folder}.log").read_text()[-6000:]
