"""Time: operations of a step against a chip, bytes on the wire against a link, on more GPUs too."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..batching.planner import Plan
from .chips import Chip
from .engines import Engine
from .scenario import Scenario
from .shapes import ModelSize

GPU_COUNTS = (4, 8, 16, 64, 256)
"""Rows of the table of scaling, besides the run's number of GPUs."""

HEAD_PASSES = 1.3
"""Products of hidden states and head weight per scored token, 2·H·V operations each: the forward's
one and what routing leaves of the backward's (1.2 to 1.4 for instruction-tuned models)."""
FLASH_PASSES = 3.5
"""Forward and backward of fused attention over its forward: the backward computes scores again."""
SYMMETRIC = 2
"""An all-reduce sends each byte twice, once to sum and once to spread."""


@dataclass(frozen=True)
class Work:
    """Operations by what they grow with."""

    per_token: float
    per_area: float  # of attention, for a query and a key it sees
    per_scored: float
    dense: bool  # attention computes what its mask hides, too

    @classmethod
    def of(cls, now: Scenario) -> Work:
        """Of training: 6 per weight and token, 2 more to compute again, 2 for a reference."""
        size, reference = now.size, float(now.runs_reference)
        again = now.computed_again + reference
        return cls(
            per_token=size.decoder_flops + 2 * again * size.decoder_weights,
            per_area=4.0 * size.attention_width * size.layers * (FLASH_PASSES + again),
            per_scored=2.0 * size.hidden_size * size.vocab_size * (HEAD_PASSES + reference),
            # A CPU's and flash kernels leave out what a mask hides.
            dense=now.packing.rows == "dense" and "flash" not in now.attention,
        )


@dataclass(frozen=True)
class Speed:
    """One step on so many ranks, seconds and counts, averaged over an epoch."""

    ranks: int
    pairs_per_step: int
    micro_batches: int
    steps_per_epoch: int
    tokens: float  # a step, all ranks, as computed
    flops: float  # a step, all ranks
    compute_s: float
    bytes: float  # a step, sent by each rank
    communication_s: float
    epochs: float
    steps: int | None = None  # where max_steps says so

    @property
    def step_s(self) -> float:
        """Communication overlaps computation: the longer of the two counts."""
        return max(self.compute_s, self.communication_s)

    @property
    def hours(self) -> float:
        steps = self.steps or self.steps_per_epoch * self.epochs
        return steps * self.step_s / 3600

    @property
    def pairs_per_s(self) -> float:
        return self.pairs_per_step / self.step_s


@dataclass(frozen=True)
class Scaled:
    """A number of GPUs. same_step is None where a step has fewer pairs than there are ranks."""

    ranks: int
    same_step: Speed | None
    same_rank: Speed
    peak: float  # bytes of a rank, with the configured pairs per rank


def speed_of(now: Scenario, chip: Chip) -> Speed:
    """The mean step of this run's first epoch."""
    plan, settings, layout = now.plan, now.settings, now.packing.layout
    steps, sharing = len(plan.steps) - 1, settings.sequence_parallel_size
    flops = _flops(plan, layout, Work.of(now))
    per_step = np.add.reduceat(flops, plan.steps[:-1], axis=0)
    # Ranks wait for each other in every micro-batch where weights are gathered, else once a step.
    gathers = now.engine.name != "ddp"
    slowest = flops.max(axis=1).sum() if gathers else per_step.max(axis=1).sum()
    micro_batches = now.planner.micro_batches
    tokens = float(plan.tokens(layout).sum()) / steps
    sent = traffic(now.size, now.engine, now.ranks, now.precision.compute_bytes, micro_batches)
    sent += exchanged(now, tokens / now.ranks)
    return Speed(
        ranks=now.ranks,
        pairs_per_step=now.pairs_per_step,
        micro_batches=micro_batches,
        steps_per_epoch=steps,
        tokens=tokens,
        flops=float(flops.sum()) / steps,
        compute_s=float(slowest) / sharing / steps / chip.flops_per_s(),
        bytes=sent,
        communication_s=sent / chip.bytes_per_s(now.ranks),
        epochs=settings.num_train_epochs,
        steps=settings.max_steps if settings.max_steps > 0 else None,
    )


def scaling(now: Scenario, chip: Chip) -> list[Scaled]:
    """The same run on more GPUs: steps of as many pairs in all, or of as many on each rank."""
    rows = []
    counts = {*GPU_COUNTS, now.ranks}
    for ranks in sorted(n for n in counts if n % now.settings.sequence_parallel_size == 0):
        more = now.changed(ranks=ranks)
        same_step = _with_pairs_per_step(more, now.pairs_per_step)
        same_speed = None if same_step is None else speed_of(same_step, chip)
        rows.append(Scaled(ranks, same_speed, speed_of(more, chip), more.memory.peak))
    return rows


def _with_pairs_per_step(now: Scenario, pairs: int) -> Scenario | None:
    """The scenario with about so many pairs a step; None where ranks would go without one."""
    if now.groups > pairs:
        return None
    per_rank = min(now.settings.per_device_train_batch_size, pairs // now.groups)
    accumulation = max(1, round(pairs / (now.groups * per_rank)))
    return now.changed(
        per_device_train_batch_size=per_rank, gradient_accumulation_steps=accumulation
    )


def _flops(plan: Plan, layout: str, work: Work) -> np.ndarray:
    """[micro-batches, R] operations of each rank."""
    count, tokens = plan.pairs.size, plan.tokens(layout)
    forest = plan.lengths.unfold(plan.order, plan.places)
    totals, prompt = forest.totals.astype(float), forest.prompt.astype(float)
    if layout == "padded":
        totals = tokens.ravel()[forest.group] / forest.rows(count)[forest.group]
    area = totals**2
    if layout == "prefix_shared" and work.dense:
        area = np.where(forest.leads, forest.tree_tokens.astype(float)[forest.tree] ** 2, 0.0)
    elif layout == "prefix_shared":
        area -= np.where(forest.leads, 0.0, prompt**2)
    area = area if work.dense else area / 2
    each = work.per_area * area + work.per_scored * forest.completion
    flops = np.bincount(forest.group, weights=each, minlength=count)
    return flops.reshape(plan.pairs.shape) + work.per_token * tokens


def traffic(
    size: ModelSize, engine: Engine, ranks: int, compute_bytes: int, micro_batches: int
) -> float:
    """Bytes that each rank sends in a step."""
    if ranks == 1:
        return 0.0
    share = (ranks - 1) / ranks
    everything, trained = size.total * compute_bytes, size.trainable * compute_bytes
    if engine.name == "zero3":  # gathered in forward and in backward, gradients scattered
        return share * micro_batches * (2 * everything + trained)
    if engine.name == "fsdp2":
        return share * (micro_batches * 2 * everything + trained)
    if engine.name == "zero2":
        return share * (micro_batches * trained + trained)
    return share * SYMMETRIC * size.trainable * 4


def exchanged(now: Scenario, tokens: float) -> float:
    """Bytes that a rank sends around attention, where ``tokens`` of it are of shared rows."""
    sharing, again = now.settings.sequence_parallel_size, now.computed_again + now.runs_reference
    heads = now.config.num_attention_heads
    keys = math.lcm(getattr(now.config, "num_key_value_heads", None) or heads, sharing)
    width = now.size.attention_width * (2 + 2 * keys / heads)  # queries, output, keys, values
    passes = 2 + again
    sent = passes * now.size.layers * width * now.precision.compute_bytes * tokens
    return sent * (sharing - 1) / sharing


def measured(speed: Speed, pairs_per_s: float) -> Speed:
    """The same step as long as a measurement has it, communication included."""
    return replace(speed, compute_s=speed.pairs_per_step / pairs_per_s, communication_s=0.0)
