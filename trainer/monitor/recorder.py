"""What evaluations in training leave for the report: histograms of margins over all pairs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from ..objectives import ObjectiveOutput
from .margins import BINS, EDGES, KINDS, MARGINS_FILE, SAMPLES_FILE, line_of

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

    def write(self, folder: str, step: int, *, main: bool) -> None:
        """Add up all ranks' counts and append them to the run's file, on the first rank."""
        if self._counts is None:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._counts)
        if main:
            counts: dict[str, list[int]] = dict(zip(KINDS, self._counts.tolist(), strict=True))
            append(Path(folder) / MARGINS_FILE, line_of(step, counts))
        self._counts = None


def append(path: Path, lines: str) -> None:
    """Add whole lines to a file, past a last one that a killed run left unfinished.

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
