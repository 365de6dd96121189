"""SIGTERM during training: a checkpoint at the end of the step, then exit status 143."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from .stopped import Stopped

SIGTERM_STATUS = 128 + signal.SIGTERM


class Preempted(Stopped):
    """SIGTERM came; the process is to end with status 143."""

    def __init__(self, step: int, checkpoint: Path | None, problem: str | None, *, quiet: bool):
        advice = "--resume_from_checkpoint=auto goes on from the last checkpoint"
        place = (step, checkpoint, problem)
        super().__init__(SIGTERM_STATUS, "stopped by SIGTERM", *place, advice, quiet=quiet)


class Preemption(TrainerCallback):
    """Listens for SIGTERM and lets the loop save and stop.

    A signal becomes ``stopping`` only when the ranks compare notes, in `agree`: once a step before
    the update, together with the loss, and after an evaluation.

    Args:
        trainer: whose training is to stop.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.stopping = False
        self._signalled = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM asks for a checkpoint at the end of the step instead of ending all."""
        self._signalled = self.stopping = False
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may handle signals
            return
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _on_sigterm(self, *_: Any) -> None:
        """Schedulers and launchers may repeat the signal, so a second one changes nothing."""
        self._signalled = True

    def agree(self, figure: Tensor | None = None) -> bool:
        """Share signals over all ranks, and whether the ``figure`` of any rank is not finite.

        A collective with several ranks, and the one value that the host reads per step.
        """
        args = self.trainer.args
        if args.world_size == 1:
            self.stopping = self.stopping or self._signalled
            return figure is not None and not bool(torch.isfinite(figure).item())
        flags = torch.tensor([self._signalled, False], dtype=torch.int32, device=args.device)
        if figure is not None:
            flags[1] = (~torch.isfinite(figure)).to(flags)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        signalled, not_finite = flags.tolist()
        self.stopping = self.stopping or bool(signalled)
        return bool(not_finite)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal during evaluation is acted on after it, not a step later."""
        if self.trainer.is_in_train:
            self.agree()
            if self.stopping:
                control.should_save = control.should_training_stop = True
