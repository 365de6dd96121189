"""`Observer`: all that a run measures of its steps and evaluations, in one place.

`RewardMetrics` keeps the rewards of an evaluation's pairs, one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback

from ..objectives import ObjectiveOutput
from ..parallel.groups import data_group
from .margins import BINS, EDGES, KINDS, MARGINS_FILE, SAMPLES_FILE, line_of
from .metrics import PreferenceMetrics, Throughput, peak_memory_mib

if TYPE_CHECKING:
    from ..model.head import HeadStats
    from ..settings.config import PreferenceConfig

logger = logging.getLogger(__name__)
_unwritten: set[Path] = set()


class MarginRecorder(TrainerCallback):
    """Counts of an evaluation's pairs by bin, kept on the device until its end.

    As a callback it empties the files where a run starts from the beginning.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # [2, BINS], by kind
        self._inner_edges: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and args.process_index == 0:
            for name in (MARGINS_FILE, SAMPLES_FILE):
                (Path(args.output_dir) / name).unlink(missing_ok=True)

    def start(self) -> None:
        """Begin an evaluation."""
        self._counts = None

    def add(self, out: ObjectiveOutput) -> None:
        """Count one micro-batch of P pairs, without waiting for the device."""
        margins = torch.stack([out.chosen_rewards - out.rejected_rewards, out.target_margins])
        if self._inner_edges is None or self._inner_edges.device != margins.device:
            inner = torch.tensor(EDGES[1:-1], dtype=torch.float64)
            self._inner_edges = inner.to(margins.device, non_blocking=True)
        place = torch.bucketize(margins.double(), self._inner_edges)
        counted = out.real & margins.isfinite()
        # Compared with every bin: few numbers, and deterministic on any device.
        bins = torch.arange(BINS, device=margins.device)
        counts = ((place[..., None] == bins) & counted[..., None]).sum(1)
        self._counts = counts if self._counts is None else self._counts + counts

    def write(self, folder: str, step: int, *, main: bool, group: Any = None) -> None:
        """Add up the counts of ``group`` and append them to the run's file, on the first rank."""
        if self._counts is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._counts, group=group)
        if main:
            counts: dict[str, list[int]] = dict(zip(KINDS, self._counts.tolist(), strict=True))
            append(Path(folder) / MARGINS_FILE, line_of(step, counts))
        self._counts = None


def append(path: Path, lines: str) -> None:
    """Add complete lines to a file, after any line that a killed run left unfinished.

    Where they cannot be written, as on a full disk, they are left out with one warning a file:
    training is worth more than they are.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(lines.encode("utf-8"))
    except OSError as error:
        if path not in _unwritten:
            logger.warning("%s cannot be written: %s. Training goes on without it", path, error)
        _unwritten.add(path)


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
        self.num_tokens = 0.0
        """Of the run's pairs so far, over all ranks, as of the last report: TRL's metric."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.margins.on_train_begin(args, state, control)
        self.restore({})

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps for the report after it; a collective."""
        sums = self.training.totals(data_group(self.settings))
        num_tokens = self.num_tokens + sums.pop("num_tokens", 0.0)
        return {"num_tokens": num_tokens, "sums": sums, "sums_seconds": self.throughput.seconds}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Begin with what a checkpoint kept, and with nothing of steps before."""
        sums = facts.get("sums", {})
        if ("entropy" in sums) != self.settings.token_metrics:  # set otherwise since
            sums = {}
        mine = self.settings.data_parallel_rank == 0  # the others' are in its sums
        device = self.settings.device
        self.training.load(
            {
                name: torch.tensor(value * mine, dtype=torch.float64, device=device)
                for name, value in sums.items()
            }
        )
        self.num_tokens = facts.get("num_tokens", 0.0)
        self.throughput.restart(facts.get("sums_seconds", 0.0) if sums else 0.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.throughput.pause()

    def add(
        self,
        batch: Mapping[str, Any],
        scored: Any,
        out: ObjectiveOutput,
        *,
        training: bool,
        with_margins: bool,
    ) -> None:
        """Add one micro-batch, without waiting for the device.

        Args:
            scored: what the patched model returned.
            with_margins: also count the pairs in the evaluation's histograms of margins.
        """
        metrics = self.training if training else self.evaluation
        sequences = batch["cu_seqlens"], batch.get("edges")
        metrics.add_pairs(out, scored.mean_logits, *sequences)
        if scored.figures is not None and self.settings.token_metrics:
            metrics.add_figures(out, scored.figures, *sequences)
        if with_margins:
            self.margins.add(out)
        if "decoder_tokens" in batch:  # a collator of the user's may not count
            metrics.add_tokens(batch["decoder_tokens"])
        if training and "num_tokens" in batch:
            metrics.add(num_tokens=batch["num_tokens"])

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
        means, counts = self.training.report(group=data_group(self.settings))
        rates = self.throughput.report(counts)
        self.num_tokens += counts.get("num_tokens", 0.0)
        if self.num_tokens:  # a collator of the user's may not count
            rates["num_tokens"] = self.num_tokens
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
        main, group = self.settings.process_index == 0, data_group(self.settings)
        means, _ = self.evaluation.report(f"{prefix}_", group)
        if prefix == "eval":
            self.margins.write(str(self.settings.output_dir), step, main=main, group=group)
        return means


class RewardMetrics:
    """Keeps each pair's rewards on the device, and gives them to ``compute_metrics`` at the end.

    Args:
        samples: how many pairs' margins to keep after that.

    Attributes:
        margins: of the first pairs in the data's order, at the last evaluation.
    """

    def __init__(
        self, compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None, samples: int = 0
    ) -> None:
        self.compute_metrics = compute_metrics
        self.samples = samples
        self.margins: list[float] = []
        self._parts: list[Tensor] = []

    @property
    def _is_wanted(self) -> bool:
        return self.compute_metrics is not None or self.samples > 0

    def add(self, pair_ids: Tensor, out: Any) -> None:
        """A micro-batch: ids [P], fillers below 0, and its `ObjectiveOutput`."""
        if self._is_wanted:
            columns = (
                pair_ids.double(),
                out.chosen_rewards.double(),
                out.rejected_rewards.double(),
            )
            self._parts.append(torch.stack([column.detach() for column in columns], dim=1))

    def figures(self, prefix: str, settings: PreferenceConfig) -> dict[str, Any]:
        """What ``compute_metrics`` says of the pairs since the last call; a collective."""
        if not self._is_wanted:
            return {}
        parts, self._parts = self._parts, []
        found = torch.cat(parts).cpu().numpy() if parts else np.zeros((0, 3))
        gathered: list[Any] = [found]
        if settings.data_parallel_size > 1:
            gathered = [None] * settings.data_parallel_size
            dist.all_gather_object(gathered, found, group=data_group(settings))
        rows = np.concatenate(gathered)
        rows = rows[rows[:, 0] >= 0]
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        first = rows[: self.samples]
        self.margins = (first[:, 1] - first[:, 2]).tolist()
        if self.compute_metrics is None:
            return {}
        labels = np.zeros(len(rows), np.int64)
        metrics = self.compute_metrics(EvalPrediction(predictions=rows[:, 1:], label_ids=labels))
        return {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
            for name, value in metrics.items()
        }
