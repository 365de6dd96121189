"""Name the rank that the others wait for.

Ranks wait for each other in collectives. These time out after ``ddp_timeout`` and name no rank. So
a thread of every rank writes its step and a sign of life to the job's key-value store every few
seconds. A rank that makes no progress for most of that time, or whose collective fails, reads the
store and names the ranks that are behind or silent.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from ..errors import UserError

SIGNS = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")
"""What the collectives' errors say when another rank is gone or late."""

JOIN_S = 30
"""Longest wait for the thread's last call to the store."""

logger = logging.getLogger(__name__)


@contextmanager
def missing_ranks(args: TrainingArguments) -> Iterator[None]:
    """A collective that fails inside, as before training, becomes a ``UserError``."""
    try:
        yield
    except RuntimeError as error:
        if args.world_size == 1 or not _is_of_others(error):
            raise
        raise UserError(
            f"rank {args.process_index}: look at the logs of the other ranks; one of them has "
            f"ended, or does not answer. ({_first_line(error)})"
        ) from error


def _is_of_others(error: RuntimeError) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in SIGNS)


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0][:200]


class Watchdog(TrainerCallback):
    """Does nothing for a single process.

    Args:
        trainer: whose steps are watched, while this is entered.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.world = trainer.args.world_size
        self.rank = trainer.args.process_index
        self.patience_s = 0.8 * trainer.args.ddp_timeout
        self.interval_s = min(5.0, trainer.args.ddp_timeout / 10)
        self._beats = 0
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._store: Any = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.world > 1 and dist.is_initialized():
            from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

            self._store = PrefixStore("widemargin", _get_default_store())
            self._last = time.monotonic()
            self._tell()  # so that a rank lost in the first seconds is not one that never began
            self.trainer.add_callback(self)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._thread is not None:
            # One that is in the store's code when the interpreter ends would abort the process.
            self._thread.join(timeout=JOIN_S)
            self.trainer.remove_callback(self)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """A collective's failure inside becomes a ``UserError`` that names the rank waited for."""
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not _is_of_others(error):
                raise
            raise UserError(
                f"rank {self.rank}, step {self._step}: a collective failed: {self.late()}. "
                f"({_first_line(error)}) Raise ddp_timeout if it was only slow; "
                "otherwise look at that rank's log, and go on from the last checkpoint"
            ) from error

    def late(self) -> str:
        """Who is behind or silent, as the store has it; it takes two intervals to tell."""
        try:
            before = [self._told(rank) for rank in range(self.world)]
            for _ in range(4):
                self._tell()
                time.sleep(self.interval_s / 2)
            after = [self._told(rank) for rank in range(self.world)]
        except RuntimeError:
            return "rank 0, which keeps the job's store, does not answer"
        phrases = []
        ahead = [state for state in after if state and _place(state) > (self._step, self._beats)]
        for rank, state in enumerate(after):
            if rank == self.rank:
                continue
            if state is None:
                phrases.append(f"rank {rank} has not begun")
            elif state == before[rank]:
                phrases.append(f"rank {rank} is silent since step {state['step']}")
            elif _place(state) < (self._step, self._beats):
                phrases.append(f"rank {rank} is still in step {state['step']}")
        if not phrases and ahead:
            return "the others wait for this rank"
        return ", ".join(phrases) or "all ranks are alive and in the same step"

    @property
    def _step(self) -> int:
        return self.trainer.state.global_step + 1

    def _told(self, rank: int) -> dict[str, Any] | None:
        key = f"rank{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _tell(self) -> None:
        state = {"step": self._step, "beats": self._beats, "alive": time.monotonic_ns()}
        self._store.set(f"rank{self.rank}", json.dumps(state))

    def _watch(self) -> None:
        warned = -1
        while not self._ended.wait(self.interval_s):
            try:
                self._tell()
            except RuntimeError:
                return  # the job is ending
            still_s = time.monotonic() - self._last
            if still_s > self.patience_s and warned != self._beats:
                warned = self._beats
                logger.warning(
                    "Rank %d has waited %.0f s in step %d: %s",
                    *(self.rank, still_s, self._step, self.late()),
                )

    def _beat(self, *_: Any, **__: Any) -> None:
        self._beats += 1
        self._last = time.monotonic()

    on_step_begin = on_substep_end = on_step_end = _beat
    on_prediction_step = on_evaluate = on_save = _beat


def _place(state: dict[str, Any]) -> tuple[int, int]:
    return state["step"], state["beats"]
