"""Changes that make a run fit, cheapest first, and the bytes that each saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import UserError
from ..settings.checks import checkpointing_options
from .engines import shipped_engine
from .scenario import Scenario
from .simulation import Checkpointing

MOST_RANKS = 1024
EIGHT_BIT = "adamw_bnb_8bit"


@dataclass(frozen=True)
class Step:
    """One change on top of those before it. Bytes of the peak saved, and the peak after it."""

    change: str
    costs: str
    saves: float
    peak: float


def advice(now: Scenario, capacity: float) -> list[Step]:
    """Changes in order until the run fits in ``capacity`` bytes; those that save nothing are left
    out, and the last may still not be enough."""
    steps: list[Step] = []
    seen: set[str] = set()
    while now.memory.peak > capacity:
        for kind, change, costs, new in _changes(now, capacity):
            if kind in seen:
                continue
            seen.add(kind)
            try:
                saved = now.memory.peak - new.memory.peak
            except UserError:  # this change cannot be made here
                continue
            if saved > 0.005 * now.memory.peak:
                steps.append(Step(change, costs, saved, new.memory.peak))
                now = new
                break
        else:
            return steps
    return steps


Change = tuple[str, str, str, Scenario]
"""Its kind, the change, what it costs, the run with it."""


def _changes(now: Scenario, capacity: float) -> Iterator[Change]:
    """In the order to try them."""
    yield from _cheap(now)
    yield from _of_the_step(now)
    yield from _of_the_engine(now, capacity)


def _cheap(now: Scenario) -> Iterator[Change]:
    settings = now.settings
    if not now.checkpointing:
        new = now.with_checkpointing()
        yield "checkpointing", "gradient_checkpointing: true", "about a third more time", new
    elif Checkpointing.of(settings).every > 1:
        change = "every_n_layers: 1 in gradient_checkpointing_kwargs"
        new = now.with_checkpointing(every_n_layers=1)
        yield "every layer", change, "up to a third more time", new
    if now.packing.layout == "padded":
        for layout in ("prefix_shared", "packed"):
            change = f"packing: {layout}"
            yield layout, change, "nothing: it is faster", now.changed(packing=layout)
    if now.runs_reference:
        new = now.changed(precompute_ref_log_probs=True)
        yield "reference", "precompute_ref_log_probs: true", "one pass before training", new
    if str(getattr(settings.optim, "value", settings.optim)) == "adamw_torch":
        new = now.changed(optim="adamw_torch_fused")
        yield "fused", "optim: adamw_torch_fused", "nothing", new


def _of_the_step(now: Scenario) -> Iterator[Change]:
    """Fewer pairs or tokens on a rank at a time."""
    settings, engine = now.settings, now.engine
    if settings.per_device_train_batch_size > 1:
        times = settings.per_device_train_batch_size
        accumulation = settings.gradient_accumulation_steps * times
        change = (
            f"per_device_train_batch_size: 1, gradient_accumulation_steps: {accumulation} "
            "(the step's pairs stay)"
        )
        new = now.changed(per_device_train_batch_size=1, gradient_accumulation_steps=accumulation)
        coupled = f"{now.objective.name} sees fewer pairs at a time"
        yield "batch", change, coupled if now.objective.couples_pairs else "some speed", new
    if now.ranks > 1 and engine.name != "zero3":
        zero3 = shipped_engine("zero3", now.size.hidden_size)
        yield "zero3", "--engine zero3", "more communication", now.changed(engine=zero3)
    sharing = 2 * settings.sequence_parallel_size
    if now.ranks % sharing == 0:
        times = 2 * settings.gradient_accumulation_steps
        change = f"sequence_parallel_size: {sharing}, gradient_accumulation_steps: {times}"
        new = now.changed(sequence_parallel_size=sharing, gradient_accumulation_steps=times)
        coupled = f", {now.objective.name} sees fewer pairs at a time"
        costs = "exchanges in every layer" + coupled * now.objective.couples_pairs
        yield f"{sharing} ranks a row", f"{change} (the step's pairs stay)", costs, new


def _of_the_engine(now: Scenario, capacity: float) -> Iterator[Change]:
    """Memory elsewhere: the host's, more GPUs'; at last fewer weights learn."""
    settings, engine = now.settings, now.engine
    if now.checkpointing and now.device == "cuda" and "offload" in checkpointing_options():
        change = "offload: true in gradient_checkpointing_kwargs"
        new = now.with_checkpointing(offload=True)
        yield "activations", change, "copies in every layer, and host memory", new
    if not now.engine.optimizer_on_cpu:
        new = now.changed(optim=EIGHT_BIT)
        change = f"optim: {EIGHT_BIT}"
        yield "8bit", change, "states rounded to 8 bits; needs bitsandbytes", new
    if now.ranks > 1 and engine.is_deepspeed:
        offload = replace(engine, optimizer_on_cpu=True)
        change = "offload_optimizer: {device: cpu} in DeepSpeed's config"
        yield "offload", change, "a slow step, and host memory", now.changed(engine=offload)
    split = engine if engine.splits_weights else shipped_engine("zero3", now.size.hidden_size)
    ranks = now.ranks
    while ranks < MOST_RANKS:
        ranks *= 2
        new = now.changed(ranks=ranks, engine=split)
        if new.memory.peak <= capacity or ranks == MOST_RANKS:
            yield "ranks", f"--gpus {ranks} --engine {split.name}", "more GPUs", new
            break
    if not settings.use_peft:
        new = now.changed(use_peft=True)
        yield "lora", "use_peft: true", "an adapter learns, not the model", new
