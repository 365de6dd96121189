"""The packing that a model takes: the first that gives what each sequence gives alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.table import TOKEN_COLUMNS
from ..errors import UserError
from ..settings.checks import is_split
from .choose import FAMILIES, Packing, longest_sequence, packings
from .inputs import model_inputs
from .recurrent import has_no_attention, is_recurrent, keep_sequences_apart
from .rope import fix_rope
from .varlen import takes_varlen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..data.table import PairLengths
    from ..settings.config import PreferenceConfig

PAIR_LENGTHS = ((5, 4, 7), (11, 9, 3))
"""Prompt, chosen and rejected tokens of the pairs that are compared."""

BOUNDS = {True: (1e-3, 1e-2), False: (0.1, 0.25)}
"""By whether the model computes in fp32: the mean difference of log-probs in nats, and the relative
one of gradients. A token that sees what it must not changes either by 0.5 and more."""

logger = logging.getLogger(__name__)


def packing_for(
    model: PreTrainedModel,
    args: PreferenceConfig,
    lengths: PairLengths | None,
    stand_in: PreTrainedModel | None = None,
) -> Packing:
    """The packing that ``args.packing`` means for a patched model and these lengths; logged.

    The model moves to the device that training will use, unless it will be split: ``stand_in``, a
    small patched model of its family there, is then compared in its place.
    """
    sharded = is_split(args)
    weight: Any = model.get_input_embeddings().weight
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    device = args.device
    moves = args.place_model_on_device and not getattr(model, "is_quantized", False)
    if moves and not sharded and model.device != device:
        model.to(device)  # pyright: ignore[reportArgumentType]
    packing = settle_packing(
        args.packing,
        model,
        sharded=sharded,
        stand_in=stand_in,
        autocast=None if half is None else torch.autocast(device.type, half),
        device=device,
        dtype=half or weight.dtype,
        lengths=lengths,
        pairs_per_batch=args.per_device_train_batch_size,
        max_tokens=args.max_tokens_per_micro_batch,
    )
    if args.process_index == 0:
        logger.info("%s", packing)
    return packing


def settle_packing(
    setting: str,
    model: PreTrainedModel,
    *,
    sharded: bool = False,
    stand_in: PreTrainedModel | None = None,
    autocast: AbstractContextManager | None = None,
    **circumstances: Any,
) -> Packing:
    """The first of `packings` that gives this patched model what each sequence gives alone.

    Rotary frequencies that depend on a batch are fixed first, see `fix_rope`.

    Args:
        sharded: the model's weights are not whole here (ZeRO-3, FSDP), so that it cannot run.
        stand_in: a small patched model of its family, compared in its place where they are not;
            None where there is none, and nothing is compared.
        autocast: what training computes in.
        circumstances: as in `packings`.

    Raises:
        UserError: ``setting`` names a layout that is not exact; the message says by how much.
            Padded batches count too: there is no other way to train such a family.
    """
    compared = stand_in if sharded else model
    candidates = packings(setting, model.config, checked=compared is not None, **circumstances)
    if any(packing.rows == "varlen" for packing in candidates):
        # Now, and not in a forward that torch.compile traces.
        text = model.config.get_text_config()
        if not has_no_attention(text):
            takes_varlen(circumstances.get("attention") or _attention(model))
        if is_recurrent(text):
            keep_sequences_apart(model)
    longest_row = _mask_size(model)
    if longest_row is not None:
        candidates = _padded_only(setting, longest_row)
    longest = longest_sequence(circumstances.get("lengths"))
    fix_rope(model, longest)
    if compared is None:
        kind = model.config.get_text_config().model_type
        if kind not in FAMILIES:
            logger.warning(
                "packing: %s was not tested with %s models, nor is their head",
                candidates[0].layout,
                kind,
            )
        return candidates[0]
    fix_rope(compared, longest)
    return _first_exact(setting, compared, candidates, autocast or nullcontext())


def _mask_size(model: nn.Module) -> int | None:
    """Tokens of the longest row of a model that keeps one causal mask, as GPT-Neo does."""
    square = (b for _, b in model.named_buffers() if b.dim() >= 2 and b.dtype == torch.bool)
    return min((b.shape[-1] for b in square if b.shape[-1] == b.shape[-2]), default=None)


def _padded_only(setting: str, longest_row: int) -> list[Packing]:
    """The only packing whose rows are no longer than a sequence."""
    reason = f"the model keeps a mask of {longest_row} tokens, and packed rows are longer"
    if setting not in ("auto", "padded"):
        raise UserError(f"packing: set padded, or auto, and not {setting}; {reason}")
    return [Packing("padded", "dense", reason if setting == "auto" else "as configured")]


def _first_exact(
    setting: str, model: PreTrainedModel, candidates: list[Packing], autocast: Any
) -> Packing:
    padded = Packing("padded", "dense", "")
    problem = failure = None
    with autocast:
        expected = Alone.of(model)
        if expected.error is not None:
            raise UserError(
                f"model: take another one; {type(model).__name__} does not run with this head, not "
                f"even on one sequence without padding: {expected.error}"
            )
        for packing in candidates:
            failure = compare_with_alone(model, packing, expected)
            if failure is None:
                whole = packing.layout != "padded" or problem is None
                return packing if whole else replace(padded, reason=problem or "")
            logger.info("packing: not %s in %s rows: %s", packing.layout, packing.rows, failure)
            problem = problem or failure
        if setting == "auto" and all(packing.layout != "padded" for packing in candidates):
            failure = compare_with_alone(model, padded, expected)
            if failure is None:
                return replace(padded, reason=problem or "")
        if setting not in ("auto", "padded"):
            raise UserError(
                f"packing: {setting} does not work with this model: {problem}; set auto"
            )
    raise UserError(
        f"model: take another one; {type(model).__name__} cannot be trained on several sequences "
        f"at once: in padded batches, {failure}"
    )


def _attention(model: Any) -> str:
    return model.config.get_text_config()._attn_implementation


@dataclass(frozen=True)
class Alone:
    """What two tiny pairs give a model, each sequence in a forward without padding."""

    logps: Tensor
    """[N], in the order of `PairCollator`'s ``targets``."""
    gradient: Tensor
    """Of their sum, for the first decoder layer's parameters, in one vector."""
    error: str | None = None
    """What the model raised, where it did."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Alone:
        rows, parameters = _rows(model), _first_layer(model)
        parts, total = [], torch.zeros(1)
        with evaluating(model):
            for side in TOKEN_COLUMNS[1:]:
                for row in rows:
                    try:
                        logps, gradient = _scored(
                            model, _one(row["prompt_ids"], row[side]), parameters
                        )
                    except Exception as error:  # each family fails in its own way
                        return cls(torch.zeros(0), total, _in_short(error))
                    parts.append(logps)
                    total = total.to(gradient.device) + gradient
        return cls(torch.cat(parts), total)


def compare_with_alone(
    model: PreTrainedModel, packing: Packing, expected: Alone | None = None
) -> str | None:
    """Score two tiny pairs in this packing; what differs from each sequence alone, or None.

    Log-probs are compared, and gradients of the first decoder layer's parameters.
    """
    expected = expected or Alone.of(model)
    if expected.error is not None:
        return expected.error
    try:
        with evaluating(model):
            logps, gradient = _scored(model, packing.collator(0)(_rows(model)), _first_layer(model))
    except Exception as error:  # whatever a family raises, the answer is that it cannot
        return _in_short(error)
    if not expected.logps.isfinite().all():
        return "log-probs are not finite"
    weight: Any = model.get_input_embeddings().weight
    full = weight.dtype == torch.float32 and not torch.is_autocast_enabled(logps.device.type)
    logps_bound, gradient_bound = BOUNDS[full]
    apart = (logps - expected.logps).abs().mean().item()
    if not apart <= logps_bound:
        return f"log-probs differ from those of each sequence alone by {apart:.2g} on average"
    norm = expected.gradient.norm().clamp_min(1e-30)
    relative = ((gradient - expected.gradient).norm() / norm).item()
    if not relative <= gradient_bound:
        return f"gradients differ from those of each sequence alone by {relative:.2g}, relatively"
    return None


def _rows(model: PreTrainedModel) -> list[dict[str, list[int]]]:
    """Two pairs of `PAIR_LENGTHS`."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = iter(range(3, 1000, 7))
    return [
        {name: [next(tokens) % vocabulary for _ in range(count)] for name, count in part}
        for part in (list(zip(TOKEN_COLUMNS, counts, strict=True)) for counts in PAIR_LENGTHS)
    ]


def _one(prompt: list[int], completion: list[int]) -> dict[str, Tensor]:
    """A batch of one sequence."""
    begin, end = len(prompt), len(prompt) + len(completion)
    return {
        "input_ids": torch.tensor([prompt + completion]),
        "select": torch.arange(begin - 1, end - 1),
        "targets": torch.tensor(completion),
    }


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _scored(
    model: Any, batch: dict[str, Any], parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and, of their sum, the gradients in one vector."""
    inputs = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in model_inputs(batch).items()
    }
    with torch.enable_grad():
        logps = model(**inputs).token_logps
        if not parameters:
            return logps.detach(), logps.new_zeros(1)
        gradients = torch.autograd.grad(logps.sum(), parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    used = [(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs]
    vector = torch.cat(used)
    shared = "own_targets" in inputs
    return logps.detach(), model.scoring.place.averaged(vector) if shared else vector


def _first_layer(model: Any) -> list[Tensor]:
    """Trainable parameters of the first decoder layer, the ones that all of attention reaches."""
    for part in (model.get_decoder(), model):
        for module in part.modules():
            if isinstance(module, nn.ModuleList) and len(module):
                return [p for p in module[0].parameters() if p.requires_grad]
    return []
