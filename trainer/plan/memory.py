"""Memory of one rank by component: parts that last, and parts that a phase of a step adds."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..settings.config import PreferenceConfig
from .batches import MicroBatch
from .engines import Engine, Precision
from .shapes import ModelSize
from .simulation import Checkpointing, Held
from .stand_in import full_logits, head_bound

GIB = 2**30
FP32 = 4
CONTEXT_GIB = {False: 0.8, True: 1.8}
"""Assumed: the CUDA context, its libraries' workspaces and, on several ranks, NCCL's buffers."""
SLACK = 0.1
"""Assumed: what the allocator cannot use again at once, as a share of what comes and goes."""

STATE_BYTES = {
    "sgd": 0,
    "adafactor": 0,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adamw_torch_8bit": 2,
    "adamw_torch_4bit": 1,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
}
"""Bytes per trained element of optimizers whose states have another size than the weights
(Adafactor keeps rows and columns: next to nothing)."""
ONE_STATE = ("lion", "adagrad", "rmsprop")
QUANTIZED = {"load_in_8bit": 1.0, "load_in_4bit": 0.5 + 4 / 64}
"""Bytes per weight; four bits come with an fp32 scale for every 64."""


@dataclass(frozen=True)
class Part:
    """One component of a rank's memory."""

    name: str
    bytes: float
    note: str = ""


@dataclass(frozen=True)
class Rank:
    """One rank of a run. ``accumulation``: micro-batches of a step."""

    settings: PreferenceConfig
    size: ModelSize
    engine: Engine
    ranks: int
    precision: Precision
    accumulation: int

    @property
    def weight_shares(self) -> int:
        """Ranks that the weights are spread over."""
        return self.ranks if self.engine.splits_weights else 1

    @property
    def state_shares(self) -> int:
        """Ranks that gradients and optimizer states are spread over."""
        return 1 if self.engine.name == "ddp" else self.ranks

    @property
    def trained_bytes(self) -> int:
        """Of a weight that learns: peft keeps an adapter's in fp32, whatever the model's dtype."""
        return FP32 if self.settings.use_peft else self.precision.stored.itemsize

    @property
    def master_bytes(self) -> int:
        """Of a weight as the optimizer updates it."""
        return FP32 if self.engine.is_deepspeed else self.trained_bytes

    @property
    def optimizer(self) -> str:
        return str(getattr(self.settings.optim, "value", self.settings.optim))


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: ``lasting`` all the time, and each phase's on top of it."""

    lasting: list[Part]
    phases: dict[str, list[Part]]
    comparison: list[Part] = field(default_factory=list)

    @property
    def worst(self) -> str:
        return max(self.phases, key=self.phase_bytes)

    @property
    def peak(self) -> float:
        return sum(part.bytes for part in self.lasting) + self.phase_bytes(self.worst)

    def phase_bytes(self, name: str) -> float:
        return sum(part.bytes for part in self.phases[name])


def rank_memory(
    rank: Rank,
    held: Held,
    batch: MicroBatch,
    *,
    checkpointing: Checkpointing | None,
    needs_reference: bool,
) -> RankMemory:
    """The memory of a rank that computes ``batch`` where others wait for it.

    Args:
        held: bytes that the simulation of ``batch`` held.
        needs_reference: the objective compares with a frozen model.
    """
    lasting = [*_weights(rank), *_learning(rank)]
    if needs_reference:
        lasting += _reference(rank)
    if not rank.settings.use_cpu:
        several = rank.ranks > 1
        name = "CUDA context" + " and NCCL" * several
        lasting.append(Part(name, CONTEXT_GIB[several] * GIB, "assumed"))
    phases = _micro_batch(rank, held, batch, checkpointing)
    phases["the optimizer's step"] = _step(rank)
    for parts in phases.values():
        slack = SLACK * sum(part.bytes for part in parts)
        parts.append(Part(f"allocator slack ({SLACK:.0%})", slack, "assumed"))
    logits = Part(
        "logits that are not there",
        full_logits(batch.tokens, rank.size.vocab_size),
        "fp32 logits, their log-softmax and its gradient, of all positions",
    )
    counted = {name: [part for part in parts if part.bytes > 0] for name, parts in phases.items()}
    return RankMemory(lasting, counted, [logits])


def _micro_batch(
    rank: Rank, held: Held, batch: MicroBatch, checkpointing: Checkpointing | None
) -> dict[str, list[Part]]:
    """The phases of a micro-batch, each with what it holds on top of what lasts."""
    gathered = _gathered(rank)
    hidden, vocab = rank.size.hidden_size, rank.size.vocab_size
    kept = Part("activations kept, of all layers", held.kept, f"{batch.tokens:,} tokens")
    if checkpointing is not None:
        every, there = checkpointing.every, "; inputs of layers in the host's memory"
        layers = "inputs of the layers" if every == 1 else f"all but one layer in {every}"
        note = kept.note + there * checkpointing.offload
        kept = Part(f"activations kept, {layers}", held.kept, note)
    copies = "copies of the weights that autocast keeps" * rank.precision.copies_weights
    forward = Part("what forward frees again", held.forward - held.kept, copies)
    layer = Part("one layer's backward, gradient of a weight", held.decoder - held.kept)
    itemsize = 0 if rank.settings.use_peft else rank.precision.simulated.itemsize
    head = Part(
        "the head's workspace, dH, dW",
        held.head - held.kept,
        f"{batch.scored:,} scored tokens; dW {vocab * hidden * itemsize / GIB:.2f} GiB, the rest "
        "and what forward kept for it at most "
        f"{head_bound(batch.scored, hidden, vocab) / GIB:.2f}",
    )
    return {
        "the forward pass": [kept, forward, *gathered],
        "backward through the layers": [kept, layer, *gathered],
        "the head": [kept, head, *gathered],
    }


def _weights(rank: Rank) -> list[Part]:
    settings, size, shares = rank.settings, rank.size, rank.weight_shares
    if rank.engine.parameters_on_cpu:
        return []
    count = (size.trainable * rank.trained_bytes + _frozen(rank)) / shares
    note = f"{size.total:,} in {_name(rank.precision.stored)}{_over(shares)}"
    if settings.load_in_4bit or settings.load_in_8bit:
        note = f"{size.quantizable:,} of {size.total:,} quantized{_over(shares)}"
    return [Part("weights", count, note)]


def _frozen(rank: Rank) -> float:
    """Bytes of all frozen weights."""
    size = rank.size
    for name, width in QUANTIZED.items():
        if getattr(rank.settings, name):
            return size.quantizable * width + (size.frozen - size.quantizable) * FP32
    return size.frozen * rank.precision.stored.itemsize


def _learning(rank: Rank) -> list[Part]:
    """Gradients, master weights, optimizer states, buffers that last."""
    engine, trained, compute = rank.engine, rank.size.trainable, rank.precision.compute_bytes
    wide = not engine.is_deepspeed or engine.gradients_fp32
    gradient = rank.master_bytes if wide else compute
    parts = []
    if not engine.optimizer_on_cpu:
        parts += _updated(rank, gradient)
    if engine.name == "zero3":
        parts.append(Part("reduce bucket", engine.reduce_bucket * compute, "reduce_bucket_size"))
    if engine.name == "zero2":
        buckets = 2 if engine.overlap else 1
        note = "reduce_bucket_size" + ", two of them (overlap_comm)" * engine.overlap
        parts.append(Part("reduce buckets", buckets * engine.reduce_bucket * compute, note))
    if engine.name == "ddp" and rank.ranks > 1:
        parts.append(Part("DDP's buckets", trained * gradient, "as large as the gradients"))
    waits = rank.accumulation > 1 and not _syncs(rank.settings)
    if engine.name == "fsdp2" and rank.ranks > 1 and waits:
        note = "unreduced until the step's last micro-batch; accelerator_config's sync_each_batch"
        parts.append(Part("unreduced gradients", trained * compute, note))
    return parts


def _updated(rank: Rank, gradient: int) -> list[Part]:
    """What the optimizer works on: gradients of so many bytes, master weights and states."""
    count, split = rank.size.trainable / rank.state_shares, _over(rank.state_shares)
    state = state_bytes(rank.optimizer, rank.master_bytes)
    parts = [Part("gradients", count * gradient, f"{gradient} bytes each{split}")]
    if rank.engine.is_deepspeed:
        parts.append(Part("fp32 master weights", count * FP32, f"DeepSpeed's{split}"))
    if state:
        note = f"{rank.optimizer}, {state} bytes each{split}"
        parts.append(Part("optimizer states", count * state, note))
    return parts


def state_bytes(optimizer: str, master: int) -> int:
    """Bytes of optimizer state per trained element, ``master`` bytes wide."""
    if optimizer in STATE_BYTES:
        return STATE_BYTES[optimizer]
    return master if optimizer.removeprefix("paged_").startswith(ONE_STATE) else 2 * master


def _syncs(settings: PreferenceConfig) -> bool:
    given = getattr(settings.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    return bool(given.get("sync_each_batch"))


def _reference(rank: Rank) -> list[Part]:
    """The frozen copy, where there is one."""
    settings, size, stored = rank.settings, rank.size, rank.precision.stored
    named = settings.ref_model_name_or_path not in (None, settings.model_name_or_path)
    if settings.precompute_ref_log_probs or (settings.use_peft and not named):
        return []
    if rank.engine.parameters_on_cpu and rank.engine.name == "zero3":
        return []
    base = size.total - (size.trainable if settings.use_peft else 0)
    note = f"a frozen model of the same shape, {_name(stored)}{_over(rank.weight_shares)}"
    return [Part("reference model", base * stored.itemsize / rank.weight_shares, note)]


def _gathered(rank: Rank) -> list[Part]:
    """Whole weights that a rank holds for a moment, and gradients on their way out."""
    size, engine, compute = rank.size, rank.engine, rank.precision.compute_bytes
    if rank.weight_shares == 1:
        return []
    if engine.name == "zero3":
        live = min(size.total, engine.max_live + engine.prefetch_bucket)
        note = "at most stage3_max_live_parameters and the prefetch bucket"
        return [Part("gathered weights", live * compute, note)]
    ends = size.head if size.tied else size.head + size.embedding
    trained = 2 * size.layer if size.trainable > size.layer else 0
    note = "two layers, head and embedding; gradients of two layers on their way out"
    return [Part("gathered weights", (2 * size.layer + ends + trained) * compute, note)]


def _step(rank: Rank) -> list[Part]:
    """The update: copies of gradients that DeepSpeed makes, and AdamW's temporary tensors."""
    engine = rank.engine
    if engine.optimizer_on_cpu:
        return [Part("nothing on the GPU", 0)]
    count = rank.size.trainable / rank.state_shares
    temporary = rank.master_bytes if rank.optimizer in ("adamw_torch", "adamw", "adam") else 0
    at_once = min(count, engine.sub_group) if engine.name == "zero3" else count
    parts = []
    if engine.name == "zero3":
        parts.append(Part("fp32 copy of gradients", at_once * FP32, "a sub_group_size at a time"))
    if engine.name == "zero2" and not temporary:
        parts.append(Part("fp32 copy of gradients", at_once * FP32))
    if temporary:
        note = "square roots of all at once; optim: adamw_torch_fused needs none"
        parts.append(Part("AdamW's temporaries", at_once * temporary, note))
    return parts


def _over(shares: int) -> str:
    return f" / {shares} ranks" if shares > 1 else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
