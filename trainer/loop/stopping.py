"""What ends a run before its last step, saved and with an exit status of its own.

SIGTERM ends it with a checkpoint at the end of the step and status 143. A collapse is warned of,
and ends it with status 3 if `stop_on_collapse` says so.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ..errors import UserError
from ..monitor.collapse import ADVICE, Sign, Watch

SIGTERM_STATUS = 128 + signal.SIGTERM
COLLAPSED_STATUS = 3

logger = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The run is saved, and the process is to end with a status that is not 0.

    A run that others wait for has not finished.

    Args:
        code: the exit status.
        reason: why, as the beginning of a sentence that goes on with "after step …".
        problem: why there is no ``checkpoint``.
        advice: what to do next.
        quiet: this rank says nothing; the first one speaks for all.
    """

    def __init__(
        self,
        code: int,
        reason: str,
        step: int,
        checkpoint: Path | None,
        problem: str | None,
        advice: str,
        *,
        quiet: bool = False,
    ) -> None:
        super().__init__(code)
        saved = f"saved in {checkpoint}" if problem is None else f"and nothing was saved: {problem}"
        self.message = f"{reason} after step {step}, {saved}; {advice}"
        self.quiet = quiet

    def __str__(self) -> str:
        return self.message


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


class Collapsed(Stopped):
    """`stop_on_collapse` ended the run; the process is to end with status 3."""

    def __init__(
        self, signs: Iterable[Sign], step: int, checkpoint: Path | None, problem: str | None,
        *, quiet: bool,
    ) -> None:  # fmt: skip
        reason = f"stopped by stop_on_collapse ({said(signs)})"
        super().__init__(COLLAPSED_STATUS, reason, step, checkpoint, problem, ADVICE, quiet=quiet)


class CollapseGuard(TrainerCallback):
    """Shows each entry of the log to a `Watch`, and warns once of each kind of sign.

    Every rank has the same log, so all of them stop at the same step.

    Attributes:
        stopping: whether a sign of this process is to end the run.
    """

    def __init__(self) -> None:
        self.watch = Watch()
        self.stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch, self.stopping = Watch(), False
        for entry in state.log_history:
            self.watch.add(entry)
        if args.stop_on_collapse and self.watch.signs:
            raise UserError(
                "stop_on_collapse: set it to false to go on from here, or begin again with other "
                f"settings; this run has collapsed: {said(self.watch.signs.values())}"
            )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        new = self.watch.add(state.log_history[-1])
        for sign in new:
            if state.is_world_process_zero:
                logger.warning("Signs of a collapse, %s. %s", sign, ADVICE)
        if new and args.stop_on_collapse:
            self.stopping = control.should_save = control.should_training_stop = True


def said(signs: Iterable[Sign]) -> str:
    return "; ".join(str(sign) for sign in signs)
