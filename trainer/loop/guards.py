"""Guards of a running training: SIGTERM, and steps that must not update the model.

Both come together in one number that the host reads per optimizer step, after the gradients'
norm is there and before the update (never per micro-batch): whether a loss or the norm is not
finite, and whether a rank has been told to stop. With several ranks one small all-reduce makes
them agree.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ..errors import UserError

if TYPE_CHECKING:
    from ..trainer import PreferenceTrainer

SIGTERM_STATUS = 128 + signal.SIGTERM
MOST_NAMED = 20
"""Pairs that a message names."""

logger = logging.getLogger(__name__)


class NotFinite(UserError):
    """A step's loss or gradient is not finite, and the model was not updated with it."""


class Preempted(SystemExit):
    """SIGTERM came and the run is saved; the process is to end with status 143.

    Not 0: a run that others wait for has not finished.
    """

    def __init__(
        self, step: int, checkpoint: Path | None, problem: str | None, *, quiet: bool = False
    ) -> None:
        super().__init__(SIGTERM_STATUS)
        if problem is not None:
            self.message = f"stopped by SIGTERM at step {step}, and nothing was saved: {problem}"
        else:
            self.message = f"stopped by SIGTERM after step {step}, saved in {checkpoint}"
        self.quiet = quiet  # the first rank speaks for all
        self.message += "; --resume_from_checkpoint=auto goes on from the last checkpoint"

    def __str__(self) -> str:
        return self.message


class Guards(TrainerCallback):
    """Watches every step of a trainer, and for SIGTERM.

    ``saved`` is the last checkpoint of this process; ``norm`` the gradient's, of the step at hand.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer: PreferenceTrainer = trainer
        self.saved: Path | None = None
        self.norm: Any = None
        self.stopping = False
        self.passed_over = 0
        self._told = False
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._loss: Tensor | None = None
        self._before: tuple[dict[str, Tensor], Tensor, dict[str, Tensor]] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM asks for a checkpoint at the end of the step instead of ending all."""
        self._told = self.stopping = False
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
        self._told = True

    def saw(self, pair_ids: Tensor, losses: Tensor, loss: Tensor) -> None:
        """Note a micro-batch of training: ids [P], losses [P] and its share of the step's loss."""
        self._seen.append((pair_ids, losses.detach()))
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.passed_over = 0
        self._forget()
        if not self.trainer.is_deepspeed_enabled:
            return
        if args.max_nonfinite_steps:
            raise UserError(
                "max_nonfinite_steps: DeepSpeed makes its update together with the backward pass, "
                "so no step can be passed over; leave it at 0"
            )
        engine: Any = self.trainer.model_wrapped
        update = engine.step

        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check(self._loss)  # before the update; the norm is known only after it
            return update(*args, **kwargs)

        engine.step = checked

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget()
        if args.max_nonfinite_steps:
            objective = self.trainer.objective.state_dict()
            kept = {name: value.clone() for name, value in objective.items()}
            metrics = self.trainer._metrics["train"].state()
            self._before = (kept, self.trainer._tr_loss.clone(), metrics)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        figures = [self._loss]
        if not self._norm_may_overflow():
            figures.append(self.norm)
        self._check(*figures)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget()
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A signal during evaluation is acted on after it, not a step later."""
        if self.trainer.is_in_train and self._agreed(self._told, None)[0]:
            self.stopping = control.should_save = control.should_training_stop = True

    def _forget(self) -> None:
        self._seen, self._loss, self.norm, self._before = [], None, None, None

    def _deepspeed_updated(self) -> bool:
        """Whether it made this step's update; recent versions pass over gradients not finite."""
        if self.norm is None or not self.trainer.is_deepspeed_enabled:
            return False
        engine: Any = self.trainer.model_wrapped
        return bool(engine.was_step_applied())

    def _norm_may_overflow(self) -> bool:
        """Whether a loss scaler (fp16) tries scales, and passes over such steps itself."""
        if self.trainer.is_deepspeed_enabled:
            return bool(self.trainer.args.fp16)
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled()

    def _check(self, *figures: Any) -> None:
        stop, bad = self._agreed(self._told, _sum(figures))
        self.stopping = self.stopping or stop
        if not bad:
            return
        args: Any = self.trainer.args
        limit = args.max_nonfinite_steps
        message = self._message()
        if self.passed_over >= limit:
            advice = f"after {limit} steps passed over" if limit else "nothing was updated"
            if self._deepspeed_updated():
                advice = "DeepSpeed had made its update, so go on from a checkpoint"
            last = self.saved or self.trainer.last_checkpoint()
            ways = "Look at these pairs, or lower learning_rate"
            if not self.trainer.is_deepspeed_enabled:
                ways += ", or pass over such steps with max_nonfinite_steps"
            raise NotFinite(
                f"{message}; {advice}. The last complete checkpoint is {last or 'none'}. {ways}"
            )
        self.passed_over += 1
        self._undo()
        if args.process_index == 0:
            logger.warning("%s; passed over (%d of %d)", message, self.passed_over, limit)

    def _agreed(self, told: bool, figure: Tensor | None) -> tuple[bool, bool]:
        """Whether any rank is told to stop, and whether the figure of any is not finite."""
        args = self.trainer.args
        if args.world_size == 1:
            return told, figure is not None and not bool(torch.isfinite(figure).item())
        flags = torch.tensor([told, False], dtype=torch.int32, device=args.device)
        if figure is not None:
            flags[1] = (~torch.isfinite(figure)).to(flags)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, bad = flags.tolist()
        return bool(stop), bool(bad)

    def _undo(self) -> None:
        """No gradient, so that the optimizer leaves the weights and its own state alone."""
        optimizer: Any = self.trainer.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self._before is not None:
            self.trainer.objective.load_state_dict(self._before[0])
            self.trainer._tr_loss.copy_(self._before[1])
            self.trainer._metrics["train"].load(self._before[2])

    def _message(self) -> str:
        seen = [(ids.tolist(), losses.tolist()) for ids, losses in self._seen]
        if self.trainer.args.world_size > 1:
            parts: list[Any] = [None] * self.trainer.args.world_size
            dist.all_gather_object(parts, seen)
            seen = [batch for part in parts for batch in part]
        losses = {i: loss for batch in seen for i, loss in zip(*batch, strict=True) if i >= 0}
        bad = sorted(i for i, loss in losses.items() if not abs(loss) < float("inf"))
        step = self.trainer.state.global_step + 1
        if bad:
            values = sorted({str(losses[i]) for i in bad})
            what = f"the loss is {' or '.join(values)} for pairs {_listed(bad)} of train_dataset"
        else:
            what = f"the gradient's norm is not finite; the step has pairs {_listed(losses)}"
            what += " of train_dataset"
        return f"Step {step}: {what} (tokenized, counted from 0)"


def _sum(figures: Any) -> Tensor | None:
    """One number, finite just if all are; sums of finite figures stay finite in fp64."""
    total = None
    for figure in figures:
        if figure is None:
            continue
        if hasattr(figure, "full_tensor"):
            figure = figure.full_tensor()
        figure = torch.as_tensor(figure, dtype=torch.float64)
        total = figure if total is None else total.to(figure.device) + figure
    return total


def _listed(ids: Any) -> str:
    ids = sorted(ids)
    more = f" and {len(ids) - MOST_NAMED} more" if len(ids) > MOST_NAMED else ""
    return ", ".join(map(str, ids[:MOST_NAMED])) + more
