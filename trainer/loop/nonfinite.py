"""What must not reach the model or its files: a loss, a gradient or weights that are not finite.

The host reads one number per optimizer step, after the gradients' norm is there and before the
update (never per micro-batch): whether a loss or the norm is not finite. With several ranks one
small all-reduce makes them agree, and carries SIGTERM with it, see `stopping`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ..errors import UserError

if TYPE_CHECKING:
    from ..monitor.metrics import PreferenceMetrics
    from ..objectives import Objective

MOST_NAMED = 20
"""Pairs that a message names."""

logger = logging.getLogger(__name__)


class NotFinite(UserError):
    """A step's loss or gradient is not finite, and the model was not updated with it."""


class NonFiniteGuard(TrainerCallback):
    """Watches every step of a trainer.

    ``norm`` is the gradient's, of the current step.

    Args:
        trainer: a `CheckpointedTrainer`, whose steps are watched.
        objective, metrics: what a step changes apart from the model, put back if it is passed over.
    """

    def __init__(self, trainer: Any, objective: Objective, metrics: PreferenceMetrics) -> None:
        self.trainer = trainer
        self.objective = objective
        self.metrics = metrics
        self.norm: Any = None
        self.passed_over = 0
        self._micro_batches: list[tuple[Tensor, Tensor]] = []
        self._loss: Tensor | None = None
        self._before: tuple[dict[str, Tensor], Tensor, dict[str, Tensor]] | None = None

    def saw(self, pair_ids: Tensor, losses: Tensor, loss: Tensor) -> None:
        """Note a micro-batch of training: ids [P], losses [P] and its share of the step's loss."""
        self._micro_batches.append((pair_ids, losses.detach()))
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
        engine = self.trainer.model_wrapped
        update = engine.step

        def checked(*args: Any, **kwargs: Any) -> Any:
            self._check(self._loss)  # before the update; the norm is known only after it
            return update(*args, **kwargs)

        engine.step = checked

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget()
        if args.max_nonfinite_steps:
            objective = {k: value.clone() for k, value in self.objective.state_dict().items()}
            self._before = (objective, self.trainer._tr_loss.clone(), self.metrics.state())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        figures = [self._loss]
        if not self._norm_may_overflow():
            figures.append(self.norm)
        self._check(*figures)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget()

    def _forget(self) -> None:
        self._micro_batches, self._loss, self.norm, self._before = [], None, None, None

    def _deepspeed_updated(self) -> bool:
        """Whether it made this step's update; recent versions pass over gradients not finite."""
        if self.norm is None or not self.trainer.is_deepspeed_enabled:
            return False
        return bool(self.trainer.model_wrapped.was_step_applied())

    def _norm_may_overflow(self) -> bool:
        """Whether a loss scaler (fp16) tries scales, and passes over such steps itself."""
        if self.trainer.is_deepspeed_enabled:
            return bool(self.trainer.args.fp16)
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled()

    def _check(self, *figures: Any) -> None:
        if not self.trainer.preemption.agree(_sum(figures)):
            return
        args = self.trainer.args
        limit = args.max_nonfinite_steps
        message = self._message()
        if self.passed_over >= limit:
            advice = f"after {limit} steps passed over" if limit else "nothing was updated"
            if self._deepspeed_updated():
                advice = "DeepSpeed had made its update, so go on from a checkpoint"
            last = self.trainer.last_saved or self.trainer.last_checkpoint()
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

    def _undo(self) -> None:
        """No gradient, so that the optimizer leaves the weights and its own state alone."""
        self.trainer.optimizer.zero_grad(set_to_none=True)
        if self._before is not None:
            objective, loss, metrics = self._before
            self.objective.load_state_dict(objective)
            self.trainer._tr_loss.copy_(loss)
            self.metrics.load(metrics)

    def _message(self) -> str:
        batches = [(ids.tolist(), losses.tolist()) for ids, losses in self._micro_batches]
        if self.trainer.args.world_size > 1:
            parts: list[Any] = [None] * self.trainer.args.world_size
            dist.all_gather_object(parts, batches)
            batches = [batch for part in parts for batch in part]
        losses = {i: loss for batch in batches for i, loss in zip(*batch, strict=True) if i >= 0}
        bad = sorted(i for i, loss in losses.items() if not abs(loss) < float("inf"))
        step = self.trainer.state.global_step + 1
        if not losses:  # a subclass computed a loss without those of pairs
            return f"Step {step}: the gradient's norm is not finite"
        if bad:
            values = sorted({str(losses[i]) for i in bad})
            what = f"the loss is {' or '.join(values)} for pairs {_listed(bad)} of train_dataset"
        else:
            what = f"the gradient's norm is not finite; the step has pairs {_listed(losses)}"
            what += " of train_dataset"
        rows: Any = self.trainer.train_dataset
        return f"Step {step}: {what} (tokenized, counted from 0{rows.within})"


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


def check_weights(trainer: Any) -> None:
    """Raise where an update has overflowed the weights, on all ranks; a collective with several.

    An update can do so by a finite gradient: in fp16, or with ``adam_epsilon: 0``.
    """
    model: Any = trainer.model
    tensors = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    bad = torch.stack([~torch.isfinite(t).all() for t in tensors if t.numel()] or [torch.tensor(0)])
    any_bad = bad.any().to(trainer.args.device, torch.int32)
    if trainer.args.world_size > 1:
        dist.all_reduce(any_bad, op=dist.ReduceOp.MAX)
    if any_bad.item():
        last = trainer.last_checkpoint()
        raise UserError(
            f"Lower learning_rate, keep weights in fp32 (dtype: float32), or raise adam_epsilon: "
            f"after step {trainer.state.global_step} the model has weights that are not finite, "
            f"and they are not saved. The last complete checkpoint is {last or 'none'}"
        )
