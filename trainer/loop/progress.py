"""Losses, metrics and seconds of a run, kept in its checkpoints and reported by a resumed run.

And where a stream was, which a resumed run reads on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from ..batching.streams import go_on_in_stream, place_in_stream
from ..checkpoint.files import MANIFEST, read_manifest
from ..parallel.groups import data_group


class Progress:
    """Puts into transformers' loop the sums that it had when its checkpoint was saved.

    Without them the loss of a resumed run would be a mean over its own steps alone, and the first
    entry of its log would lack the steps between the last log and the checkpoint.

    Args:
        trainer: whose loop it is.
        folder: of the checkpoint that the run goes on from, if it does.
    """

    def __init__(self, trainer: Any, folder: Path | None) -> None:
        self.trainer = trainer
        self.began = time.monotonic()
        self.before: dict[str, Any] = {}
        if folder is not None and (folder / MANIFEST).is_file():
            self.before = read_manifest(folder)["run"].get("progress", {})
            go_on_in_stream(trainer.train_dataset, self.before)
        self.restored = False

    @property
    def seconds(self) -> float:
        """Of training, over all processes that carried it out one after another."""
        return self.before.get("seconds", 0.0) + time.monotonic() - self.began

    def facts(self) -> dict[str, Any]:
        """What a checkpoint's manifest keeps; a collective with several ranks."""
        return {
            "loss_sum": self.trainer._total_loss_scalar,
            "pending_loss": self._pending_loss(),
            "last_logged": self.trainer._globalstep_last_logged,
            "seconds": self.seconds,
            **self.trainer.observer.facts(),
            **place_in_stream(self.trainer.train_dataset),
        }

    def _pending_loss(self) -> float:
        args = self.trainer.args
        pending = self.trainer._tr_loss.detach().to(torch.float64, copy=True)
        if args.world_size > 1:
            dist.all_reduce(pending, group=data_group(args))
        return pending.item() / args.data_parallel_size

    def restore(self) -> None:
        """Once, after transformers has set its sums to zero and before the first step."""
        if self.before and not self.restored:
            trainer = self.trainer
            trainer._total_loss_scalar = self.before["loss_sum"]
            trainer._tr_loss = torch.full_like(trainer._tr_loss, self.before["pending_loss"])
            trainer._globalstep_last_logged = int(self.before["last_logged"])
            trainer.observer.restore(self.before)
        self.restored = True

    def began_at(self) -> float:
        """When the run would have begun without a break; called once, for transformers' report.

        From now on all steps of the run count, and of the losses since the last log the mean over
        ranks, of which transformers adds the first rank's alone. A collective with several ranks.
        """
        self.trainer._tr_loss.fill_(self._pending_loss())
        if self.before:
            self.trainer._initial_global_step = 0
        return time.time() - self.seconds


class EpochEnd(TrainerCallback):
    """Logs and evaluates at an epoch's last step before the checkpoint of that step is saved.

    transformers saves first, so a run that goes on from there would lack both in its report. A run
    that is being stopped saves first here too, since it has little time.

    Args:
        trainer: the trainer whose callback this is.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._done_at = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends = control.should_training_stop or float(state.epoch).is_integer()
        if ends and control.should_save and not self.trainer.stopping:
            self._done_at = state.global_step
            control.should_log |= args.logging_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch" and (
                args.eval_delay <= state.epoch
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._done_at == state.global_step:
            control.should_log = control.should_evaluate = False


def follow_schedule(scheduler: Any) -> None:
    """Give the optimizer the rate of the next step in this run's schedule.

    A checkpoint's optimizer has the rate of its own schedule: 0 at the end of a run that a longer
    one goes on from, so that a step would change nothing. A run of as many steps keeps its rate.

    transformers' schedules are each a `LambdaLR`; a subclass may compute its rates in another way.
    """
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if type(schedule) is LambdaLR:
        rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [base * share(schedule.last_epoch) for base, share in rates]
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
