"""An estimate as a page of text and as JSON."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from .estimate import Estimate
from .memory import CONTEXT_GIB, GIB, SLACK, Part
from .speed import HEAD_PASSES

WIDTH = 52
COLUMNS = 110


def page(estimate: Estimate) -> list[str]:
    """Lines for the terminal."""
    assumptions = ["Assumed", *(f"  - {line}" for line in assumptions_of(estimate))]
    blocks = [
        _wrapped(_head(estimate), 11),
        _memory(estimate),
        _wrapped(_verdict(estimate), 5),
        _speed(estimate),
        _scaling(estimate),
        _wrapped(assumptions, 4),
    ]
    return [line for block in blocks if block for line in ["", *block]][1:]


def _wrapped(lines: list[str], indent: int) -> list[str]:
    """Lines of text no longer than a terminal is wide, for most."""
    return [
        piece
        for line in lines
        for piece in textwrap.wrap(line, COLUMNS, subsequent_indent=" " * indent)
    ]


def _head(estimate: Estimate) -> list[str]:
    now, size = estimate.now, estimate.now.size
    settings, batch = now.settings, now.batch
    learn = f", {size.trainable:,} of them learn" if size.frozen else ""
    sharing = settings.sequence_parallel_size
    each = "a rank" if sharing == 1 else f"for every {sharing} ranks"
    per_rank = f"{settings.per_device_train_batch_size} {each}"
    ranks = f"{now.ranks} GPU" + "s" * (now.ranks > 1)
    if now.device == "cpu":
        ranks = f"{now.ranks} process" + "es" * (now.ranks > 1) + " on a CPU"
    scored = f"{batch.scored:,} scored"
    tokens = float(now.plan.tokens(now.packing.layout).sum()) / (len(now.plan.steps) - 1)
    times = f"{now.planner.micro_batches} micro-batch" + "es" * (now.planner.micro_batches > 1)
    rows = f"{batch.rows} x {batch.length:,} = " if batch.rows > 1 else ""
    return [
        f"Plan of {estimate.path}: {ranks} of {estimate.capacity / GIB:g} GiB, {now.engine.name}",
        f"  model    {now.config.model_type}, {size.layers} layers, {size.total:,} parameters"
        f"{learn} ({estimate.model_source})",
        f"  engine   {now.engine.name} ({now.engine.source or 'as asked'})",
        f"  data     {now.lengths.source}",
        f"  {str(now.packing).replace(': ', '  ', 1)}",
        f"  step     {now.pairs_per_step:,} pairs: {per_rank}, {times}, {ranks}; {tokens:,.0f} "
        f"tokens, {tokens / now.ranks:,.0f} a rank",
        f"  largest  micro-batch of a rank: {rows}{batch.tokens:,} tokens, {scored}",
    ]


def _memory(estimate: Estimate) -> list[str]:
    memory = estimate.now.memory
    lines = [f"{'Memory of a rank':<{WIDTH + 2}}{'GiB':>8}"]
    lines += [_line(part) for part in memory.lasting]
    lasting = sum(part.bytes for part in memory.lasting)
    lines.append(_line(Part("= all the time", lasting)))
    for name, parts in memory.phases.items():
        worst = "   <- the peak" if name == memory.worst else ""
        lines.append(_line(Part(f"+ in {name}", memory.phase_bytes(name)), worst))
        lines += [_line(Part(f"    {p.name}", p.bytes, p.note)) for p in parts]
    lines.append(_line(Part("= peak", memory.peak)))
    lines.append("")
    for on, held in estimate.activations.items():
        how = "with checkpointing" if on else "without checkpointing"
        lines.append(_line(Part(f"activations {how}", held.peak)))
    lines += [_line(part) for part in memory.comparison]
    return lines


def _line(part: Part, after: str = "") -> str:
    note = f"  {part.note}" if part.note else ""
    return f"  {part.name:<{WIDTH}}{part.bytes / GIB:>8.2f}{note}{after}"


def _verdict(estimate: Estimate) -> list[str]:
    peak, capacity = estimate.now.memory.peak, estimate.capacity
    share = f"{peak / GIB:.1f} of {capacity / GIB:g} GiB"
    bound = " (an upper bound)" if estimate.now.lengths.bound else ""
    if estimate.fits:
        room = capacity - peak
        return [f"It fits: {share}{bound}, headroom {room / GIB:.1f} GiB ({room / capacity:.0%})."]
    lines = [f"It does not fit: {share}{bound}, {(peak - capacity) / GIB:.1f} GiB too many."]
    if not estimate.advice:
        return [*lines, "Nothing known here would help."]
    lines.append("What to change, in this order, each on top of those before it:")
    for number, step in enumerate(estimate.advice, 1):
        fits = "fits" if step.peak <= capacity else "not yet"
        lines.append(
            f"  {number}. {step.change}: saves {step.saves / GIB:.1f} GiB -> "
            f"{step.peak / GIB:.1f} GiB, {fits} (costs: {step.costs})"
        )
    if estimate.advice[-1].peak > capacity:
        lines.append("  Even so it does not fit: a smaller model, or shorter limits.")
    return lines


def _speed(estimate: Estimate) -> list[str]:
    speed, bound = estimate.speed, estimate.now.lengths.bound and not estimate.measured
    if speed is None:
        return ["Time: give --pairs-per-s or --tflops; the speed of a CPU is not known"]
    most = "at most " if bound else ""
    steps = f"{speed.steps or speed.steps_per_epoch:,} steps"
    if not speed.steps and speed.epochs != 1:
        steps += f" an epoch, {speed.epochs:g} epochs"
    lines = [
        f"Time: {most}{_seconds(speed.step_s)} a step, {steps}: {most}"
        f"{speed.hours:.1f} hours, {speed.pairs_per_s:.1f} pairs/s",
    ]
    if estimate.measured:
        return [*lines, f"  from {estimate.measured}"]
    return [
        *lines,
        f"  {speed.flops:.3g} operations a step: computation {_seconds(speed.compute_s)}; "
        f"{speed.bytes / 1e9:,.0f} GB sent by each rank: communication "
        f"{_seconds(speed.communication_s)}",
    ]


def _scaling(estimate: Estimate) -> list[str]:
    if not estimate.scaling:
        return []
    pairs = estimate.now.pairs_per_step
    lines = [
        f"{'':7}{f'same pairs a step ({pairs})':^38}{'same pairs a rank':^46}",
        f"{'GPUs':>5}  {'step':>8} {'send/compute':>13} {'hours':>7} {'speed-up':>8}"
        f"  {'pairs':>7} {'step':>8} {'send/compute':>13} {'hours':>7}  {'GiB':>6}",
    ]
    first = next((row.same_step for row in estimate.scaling if row.same_step), None)
    for row in estimate.scaling:
        same, other = row.same_step, row.same_rank
        left = f"{'fewer pairs than ranks':>38}"
        if same is not None and first is not None:
            times = first.hours / same.hours
            left = (
                f"{_seconds(same.step_s):>8} {_ratio(same):>13} {same.hours:>7.2f} {times:>7.1f}x"
            )
        lines.append(
            f"{row.ranks:>5}  {left}  {other.pairs_per_step:>7,} {_seconds(other.step_s):>8} "
            f"{_ratio(other):>13} {other.hours:>7.2f}  {row.peak / GIB:>6.1f}"
        )
    lines.append(
        "  Where send/compute is above 1 the link decides. With the same pairs a rank there are "
        "fewer, larger steps: the learning rate is another question then."
    )
    return ["Scaling", *lines]


def _ratio(speed: Any) -> str:
    return f"{speed.communication_s / speed.compute_s:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def assumptions_of(estimate: Estimate) -> list[str]:
    """Everything in the estimate that nobody measured or said."""
    now, chip = estimate.now, estimate.chip
    several = now.ranks > 1
    lines = []
    if now.device == "cuda":
        lines.append(f"CUDA context {CONTEXT_GIB[several]} GiB; allocator slack {SLACK:.0%}")
    lines.append("the largest micro-batch is the first epoch's; later epochs draw others")
    if "flash" in now.attention or now.packing.rows != "dense":
        lines.append(f"{now.attention} keeps queries, keys, values, output and one number a query")
    if estimate.speed is not None:
        source = "as measured, for other numbers of GPUs" if estimate.measured else "--mfu"
        lines.append(
            f"{chip.tflops:g} TFLOP/s at the peak (--tflops; A100 312, H100 and H200 989), "
            f"{chip.mfu:.0%} of it reached, recomputation counted ({source}); head "
            f"{HEAD_PASSES:g} passes"
        )
    if several or estimate.scaling:
        lines.append(
            f"{chip.node_gb_s:g} GB/s a GPU each way within {chip.per_node} GPUs "
            f"(--node-bandwidth, --gpus-per-node), {chip.network_gb_s:g} GB/s beyond "
            "(--network-bandwidth); sending hides behind computation, the longer of them counts"
        )
    lines.append("not counted: evaluation, saving, the first steps, loading")
    return lines


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """The same for other programs; bytes and seconds."""
    now, memory, speed = estimate.now, estimate.now.memory, estimate.speed
    return {
        "config": estimate.path,
        "gpus": now.ranks,
        "capacity_bytes": estimate.capacity,
        "engine": asdict(now.engine),
        "model": asdict(now.size) | {"source": estimate.model_source},
        "data": now.lengths.source,
        "layout": now.packing.layout,
        "pairs_per_step": now.pairs_per_step,
        "micro_batches": now.planner.micro_batches,
        "largest_micro_batch": asdict(now.batch),
        "memory": {
            "lasting": [asdict(part) for part in memory.lasting],
            "phases": {n: [asdict(p) for p in parts] for n, parts in memory.phases.items()},
            "comparison": [asdict(part) for part in memory.comparison],
            "peak_bytes": memory.peak,
            "worst_phase": memory.worst,
        },
        "activations": {
            "checkpointing" if on else "whole": asdict(held)
            for on, held in estimate.activations.items()
        },
        "fits": estimate.fits,
        "headroom_bytes": estimate.capacity - memory.peak,
        "advice": [asdict(step) for step in estimate.advice],
        "speed": speed and asdict(speed) | {"step_s": speed.step_s, "hours": speed.hours},
        "measured": estimate.measured,
        "scaling": [asdict(row) for row in estimate.scaling],
        "assumed": assumptions_of(estimate),
    }
