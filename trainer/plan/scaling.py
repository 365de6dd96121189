"""The same run on more GPUs: steps of as many pairs in all, or of as many on each rank."""

from __future__ import annotations

from dataclasses import dataclass

from .chips import Chip
from .evaluation import Evaluation
from .speed import Speed, Work, step_speed

SAMPLED_PAIRS = 20_000
COUNTS = (4, 8, 16, 64, 256)


@dataclass(frozen=True)
class Scaled:
    """A number of GPUs. same_step is None where a step has fewer pairs than there are ranks."""

    ranks: int
    same_step: Speed | None
    same_rank: Speed
    peak: float  # bytes of a rank, with the configured pairs per rank


def speed_of(now: Evaluation, chip: Chip) -> Speed:
    """The mean step of this run."""
    settings, packing = now.settings, now.packing
    reference = now.objective.needs_reference and not now.precomputed
    # A CPU's and flash kernels leave out what a mask hides.
    dense = packing.rows == "dense" and "flash" not in now.attention
    work = Work.of(now.size, now.checkpointing, reference, dense)
    return step_speed(
        now.plan, packing.layout, work, now.size, now.engine, chip,
        now.precision.compute_bytes, now.pairs_per_step, now.planner.micro_batches,
        settings.num_train_epochs, settings.max_steps if settings.max_steps > 0 else None,
    )  # fmt: skip


def scaling(now: Evaluation, chip: Chip) -> list[Scaled]:
    """The table's rows, this run's own number of GPUs among them."""
    whole = now.pairs_per_step
    found = []
    for ranks in sorted({*COUNTS, now.ranks}):
        more = now.changed(ranks=ranks)
        each = now.settings.per_device_train_batch_size
        same_step = None
        if ranks <= whole:
            each = min(each, whole // ranks)
            accumulation = max(1, round(whole / (ranks * each)))
            same_step = speed_of(
                more.changed(
                    per_device_train_batch_size=each, gradient_accumulation_steps=accumulation
                ),
                chip,
            )
        found.append(Scaled(ranks, same_step, speed_of(more, chip), more.memory.peak))
    return found
