"""Memory of one rank by component: what stays, and what comes on top in each part of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .batches import MicroBatch
from .engines import Engine
from .head_memory import bound, full_logits
from .shapes import ModelSize
from .simulation import Held, Recipe

if TYPE_CHECKING:
    from ..settings.config import PreferenceConfig

GIB = 2**30
FP32, HALF = 4, 2
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
"""Bytes per trained element of optimizers whose states have a size of their own (Adafactor keeps
rows and columns: next to nothing)."""
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
class Precision:
    """Dtypes as the engine arranges them."""

    stored: torch.dtype  # of the weights that stay on the rank
    simulated: torch.dtype  # of the weights that a layer computes with
    autocast: torch.dtype | None

    @property
    def compute_bytes(self) -> int:
        return (self.autocast or self.simulated).itemsize

    @property
    def copies_weights(self) -> bool:
        """Whether autocast rounds weights that are wider."""
        return self.autocast not in (None, self.simulated)


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


def precision(settings: PreferenceConfig, config: Any, engine: Engine) -> Precision:
    """How the run computes."""
    half = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None
    name = settings.dtype
    saved = getattr(config, "dtype", None) or torch.float32
    loaded = saved if name == "auto" else getattr(torch, name)
    if engine.is_deepspeed:
        return Precision(half or torch.float32, half or torch.float32, None)
    if engine.name == "fsdp2":
        stored = torch.float32 if half else loaded
        return Precision(stored, half or loaded, half)
    if settings.load_in_4bit or settings.load_in_8bit:
        return Precision(half or loaded, half or loaded, half)
    return Precision(loaded, loaded, half)


def rank_memory(
    settings: PreferenceConfig,
    size: ModelSize,
    engine: Engine,
    ranks: int,
    kinds: Precision,
    held: Held,
    batch: MicroBatch,
    accumulation: int,
    needs_reference: bool,
    recipe: Recipe,
) -> RankMemory:
    """The memory of a rank that computes ``batch`` where others wait for it.

    Args:
        held: what the simulation of ``recipe`` found for ``batch``.
        accumulation: micro-batches of a step.
        needs_reference: the objective compares with a frozen model.
    """
    shares = ranks if engine.splits_weights else 1
    lasting = _weights(settings, size, engine, shares, kinds)
    lasting += _learning(settings, size, engine, ranks, kinds, accumulation)
    if needs_reference and (part := _reference(settings, size, engine, shares, kinds)):
        lasting.append(part)
    if recipe.device == "cuda":
        several = " and NCCL" if ranks > 1 else ""
        lasting.append(Part(f"CUDA context{several}", CONTEXT_GIB[ranks > 1] * GIB, "assumed"))
    gathered = _gathered(size, engine, ranks, kinds)
    how = "inputs of the layers" if recipe.checkpointing else "of all layers"
    vocab, hidden = size.vocab_size, size.hidden_size
    kept = Part(f"activations kept, {how}", held.kept, f"{batch.tokens:,} tokens")
    layer = Part("one layer's backward, gradient of a weight", held.decoder - held.kept)
    text = "copies of the weights that autocast keeps" if kinds.copies_weights else ""
    forward = Part("what forward frees again", held.forward - held.kept, text)
    d_weight = 0 if settings.use_peft else vocab * hidden * kinds.simulated.itemsize
    head = Part(
        "the head's workspace, dH, dW",
        held.head - held.kept,
        f"{batch.scored:,} scored tokens; dW {d_weight / GIB:.2f} GiB, the rest and what forward "
        f"kept for it at most {bound(batch.scored, hidden, vocab) / GIB:.2f}",
    )
    phases = {
        "the forward pass": [kept, forward, *gathered],
        "backward through the layers": [kept, layer, *gathered],
        "the head": [kept, head, *gathered],
        "the optimizer's step": _step(settings, size, engine, ranks, kinds),
    }
    for parts in phases.values():
        parts.append(
            Part(f"allocator slack ({SLACK:.0%})", SLACK * sum(p.bytes for p in parts), "assumed")
        )
    positions = batch.tokens
    return RankMemory(
        lasting,
        {name: [p for p in parts if p.bytes > 0] for name, parts in phases.items()},
        [
            Part(
                "logits that are not there",
                full_logits(positions, vocab),
                "fp32 logits, their log-softmax and its gradient, of all positions",
            )
        ],
    )


def _weights(
    settings: PreferenceConfig, size: ModelSize, engine: Engine, shares: int, kinds: Precision
) -> list[Part]:
    if engine.parameters_on_cpu:
        return []
    amount = (
        size.trainable * _trained_bytes(settings, kinds) / shares
        + _frozen(settings, size, kinds) / shares
    )
    split = f" / {shares} ranks" if shares > 1 else ""
    text = f"{size.total:,} in {_name(kinds.stored)}{split}"
    if settings.load_in_4bit or settings.load_in_8bit:
        text = f"{size.quantizable:,} of {size.total:,} quantized{split}"
    return [Part("weights", amount, text)]


def _trained_bytes(settings: PreferenceConfig, kinds: Precision) -> int:
    """Of each weight that learns: peft keeps an adapter's in fp32, whatever the model's dtype."""
    return FP32 if settings.use_peft else kinds.stored.itemsize


def _frozen(settings: PreferenceConfig, size: ModelSize, kinds: Precision) -> float:
    """Bytes of all frozen weights."""
    for name, width in QUANTIZED.items():
        if getattr(settings, name):
            return size.quantizable * width + (size.frozen - size.quantizable) * FP32
    return size.frozen * kinds.stored.itemsize


def _learning(
    settings: PreferenceConfig,
    size: ModelSize,
    engine: Engine,
    ranks: int,
    kinds: Precision,
    accumulation: int,
) -> list[Part]:
    """Gradients, master weights, optimizer states, buffers that last."""
    trained, compute = size.trainable, kinds.compute_bytes
    shares = 1 if engine.name == "ddp" else ranks
    own = trained / shares
    split = f" / {shares} ranks" if shares > 1 else ""
    master = FP32 if engine.is_deepspeed else _trained_bytes(settings, kinds)
    gradient = compute if engine.is_deepspeed and not engine.gradients_fp32 else master
    state = state_bytes(settings, master)
    parts = []
    if not engine.optimizer_on_cpu:
        parts.append(Part("gradients", own * gradient, f"{gradient} bytes each{split}"))
        if engine.is_deepspeed:
            parts.append(Part("fp32 master weights", own * FP32, f"DeepSpeed's{split}"))
        if state:
            text = f"{_optimizer(settings)}, {state} bytes each{split}"
            parts.append(Part("optimizer states", own * state, text))
    if engine.name == "zero3":
        parts.append(Part("reduce bucket", engine.reduce_bucket * compute, "reduce_bucket_size"))
    if engine.name == "zero2":
        buckets = 2 if engine.overlap else 1
        text = "reduce_bucket_size" + ", two of them (overlap_comm)" * engine.overlap
        parts.append(Part("reduce buckets", buckets * engine.reduce_bucket * compute, text))
    if engine.name == "ddp" and ranks > 1:
        parts.append(Part("DDP's buckets", trained * gradient, "as large as the gradients"))
    if engine.name == "fsdp2" and ranks > 1 and accumulation > 1 and not _syncs(settings):
        text = "whole until the step's last micro-batch; accelerator_config's sync_each_batch"
        parts.append(Part("unreduced gradients", trained * compute, text))
    return parts


def state_bytes(settings: PreferenceConfig, master: int) -> int:
    """Bytes of optimizer state per trained element, ``master`` bytes wide."""
    name = _optimizer(settings)
    if name in STATE_BYTES:
        return STATE_BYTES[name]
    return master if name.removeprefix("paged_").startswith(ONE_STATE) else 2 * master


def _optimizer(settings: PreferenceConfig) -> str:
    return str(getattr(settings.optim, "value", settings.optim))


def _syncs(settings: PreferenceConfig) -> bool:
    given = getattr(settings.accelerator_config, "gradient_accumulation_kwargs", None) or {}
    return bool(given.get("sync_each_batch"))


def _reference(
    settings: PreferenceConfig, size: ModelSize, engine: Engine, shares: int, kinds: Precision
) -> Part | None:
    """The frozen copy, where there is one."""
    named = settings.ref_model_name_or_path not in (None, settings.model_name_or_path)
    if settings.precompute_ref_log_probs or (settings.use_peft and not named):
        return None
    if engine.parameters_on_cpu and engine.name == "zero3":
        return None
    text = f"a frozen model of the same shape, {_name(kinds.stored)}"
    split = f" / {shares} ranks" if shares > 1 else ""
    base = size.total - (size.trainable if settings.use_peft else 0)
    return Part("reference model", base * kinds.stored.itemsize / shares, text + split)


def _gathered(size: ModelSize, engine: Engine, ranks: int, kinds: Precision) -> list[Part]:
    """Whole weights that a rank holds for a moment, and gradients on their way out."""
    compute = kinds.compute_bytes
    if ranks == 1 or not engine.splits_weights:
        return []
    if engine.name == "zero3":
        live = min(size.total, engine.max_live + engine.prefetch_bucket)
        text = "at most stage3_max_live_parameters and the prefetch bucket"
        return [Part("gathered weights", live * compute, text)]
    tail = size.head if size.tied else size.head + size.embedding
    text = "two layers, head and embedding; gradients of two layers on their way out"
    trained = 2 * size.layer if size.trainable > size.layer else 0
    return [Part("gathered weights", (2 * size.layer + tail + trained) * compute, text)]


def _step(
    settings: PreferenceConfig, size: ModelSize, engine: Engine, ranks: int, kinds: Precision
) -> list[Part]:
    """The update: copies of gradients that DeepSpeed makes, and what AdamW computes aside."""
    if engine.optimizer_on_cpu:
        return [Part("nothing on the GPU", 0)]
    own = size.trainable / (1 if engine.name == "ddp" else ranks)
    master = FP32 if engine.is_deepspeed else _trained_bytes(settings, kinds)
    aside = master if _optimizer(settings) in ("adamw_torch", "adamw", "adam") else 0
    together = min(own, engine.sub_group) if engine.name == "zero3" else own
    parts = []
    if engine.name == "zero3":
        parts.append(Part("fp32 copy of gradients", together * FP32, "a sub_group_size at a time"))
    if engine.name == "zero2" and not aside:
        parts.append(Part("fp32 copy of gradients", together * FP32))
    if aside:
        text = "square roots of all at once; optim: adamw_torch_fused needs none"
        parts.append(Part("AdamW's temporaries", together * aside, text))
    return parts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
