"""`Observer`: all that a run measures of its steps and evaluations, in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from .metrics import PreferenceMetrics
from .recorder import MarginRecorder
from .throughput import Throughput, peak_memory_mib

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.head import HeadStats
    from ..objectives import ObjectiveOutput
    from ..settings.config import PreferenceConfig


class Observer(TrainerCallback):
    """Metrics of training and evaluation, histograms of margins, speed and memory.

    As a callback it starts and stops the clock with training.

    Args:
        model: the one that trains.
        settings: the run's.
    """

    def __init__(self, model: Any, settings: PreferenceConfig) -> None:
        self.settings = settings
        self.training = PreferenceMetrics()
        self.evaluation = PreferenceMetrics()
        self.margins = MarginRecorder()
        self.throughput = Throughput(model, settings.device, settings.world_size)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.margins.on_train_begin(args, state, control)
        self.throughput.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.throughput.pause()

    def add(
        self,
        batch: Mapping[str, Any],
        mean_logits: Tensor,
        out: ObjectiveOutput,
        *,
        training: bool,
        with_margins: bool,
    ) -> None:
        """Add one micro-batch, without waiting for the device.

        Args:
            mean_logits: [N].
            with_margins: also count the pairs in the evaluation's histograms of margins.
        """
        metrics = self.training if training else self.evaluation
        metrics.add_pairs(out, mean_logits, batch["cu_seqlens"])
        if with_margins:
            self.margins.add(out)
        if "decoder_tokens" in batch:  # a collator of the user's may not count
            metrics.add_tokens(batch["decoder_tokens"])

    def add_head(self, stats: HeadStats) -> None:
        """Add what the head's backward pass of one micro-batch left."""
        self.training.add(
            batches=torch.ones_like(stats.active_fraction),
            **{
                "head/active_fraction": stats.active_fraction,
                "head/averaged_mass": stats.averaged_mass_mean,
            },
        )

    def training_figures(self) -> dict[str, float]:
        """Means over all ranks since the last call, rates and memory; call it on all ranks."""
        means, counts = self.training.report()
        means.pop("loss", None)
        rates = self.throughput.report(counts)
        return {**means, **rates, "peak_memory_mib": peak_memory_mib(self.settings.device)}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Begin an evaluation, whose time does not count as training."""
        self.evaluation = PreferenceMetrics()
        self.margins.start()
        with self.throughput.paused():
            yield

    def evaluation_figures(self, prefix: str, step: int) -> dict[str, float]:
        """Means over the evaluation's pairs, and its margins to their file; call it on all ranks.

        The file has the margins of one evaluation a step: the one without a name.
        """
        means, _ = self.evaluation.report(f"{prefix}_")
        if prefix == "eval":
            main = self.settings.process_index == 0
            self.margins.write(str(self.settings.output_dir), step, main=main)
        return means
