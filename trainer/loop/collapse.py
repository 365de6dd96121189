"""Warn of a collapse, and stop the run there if `stop_on_collapse` says so."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import UserError
from ..monitor.collapse import ADVICE, Sign, Watch
from .stopped import Stopped

COLLAPSED_STATUS = 3

logger = logging.getLogger(__name__)


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
