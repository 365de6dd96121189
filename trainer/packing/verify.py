"""The packing that a model takes: the first that gives what padded batches give."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.table import TOKEN_COLUMNS
from ..errors import UserError
from ..settings.checks import is_split
from .choose import FAMILIES, Packing, packings
from .collator import PairCollator, model_inputs
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
    model: PreTrainedModel, args: PreferenceConfig, lengths: PairLengths | None
) -> Packing:
    """The packing that ``args.packing`` means for a patched model and these lengths; logged.

    The model moves to the device that training will use, unless it will be split.
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
    autocast: AbstractContextManager | None = None,
    **circumstances: Any,
) -> Packing:
    """The first of `packings` that gives this patched model what padded batches give it.

    Args:
        sharded: the weights are not whole here (ZeRO-3, FSDP), so that nothing can be compared.
        autocast: what training computes in.
        circumstances: as in `packings`.

    Raises:
        UserError: ``setting`` names a layout that is not exact; the message says by how much.
    """
    candidates = packings(setting, model.config, checked=not sharded, **circumstances)
    for packing in candidates:
        if packing.rows == "varlen":  # now, and not in a forward that torch.compile traces
            takes_varlen(circumstances.get("attention") or _attention(model))
    if sharded:
        kind = model.config.get_text_config().model_type
        if candidates[0].layout != "padded" and kind not in FAMILIES:
            logger.warning("packing: %s was not tested with %s models", setting, kind)
        return candidates[0]
    problem = None
    packing = candidates[0]
    for packing in candidates:
        if packing.layout == "padded":
            break
        with autocast or nullcontext():
            failure = compare_with_padded(model, packing)
        if failure is None:
            return packing
        problem = problem or failure
        logger.info("packing: not %s in %s rows: %s", packing.layout, packing.rows, failure)
    else:
        raise UserError(f"packing: {setting} does not work with this model: {problem}; set auto")
    return packing if problem is None else Packing("padded", "dense", problem)


def _attention(model: Any) -> str:
    return model.config.get_text_config()._attn_implementation


def compare_with_padded(model: PreTrainedModel, packing: Packing) -> str | None:
    """Score two tiny pairs in both layouts; what is wrong with the packed one, or None.

    Log-probs are compared, and gradients of the first decoder layer's parameters.
    """
    vocabulary = model.config.get_text_config().vocab_size
    tokens = iter(range(3, 1000, 7))
    rows = [
        {name: [next(tokens) % vocabulary for _ in range(count)] for name, count in part}
        for part in (list(zip(TOKEN_COLUMNS, counts, strict=True)) for counts in PAIR_LENGTHS)
    ]
    parameters = _first_layer(model)
    was_training = model.training
    model.eval()
    try:
        expected, expected_gradient = _scored(model, PairCollator(0)(rows), parameters)
        logps, gradient = _scored(model, packing.collator(0)(rows), parameters)
    except Exception as error:  # whatever a family raises, the answer is that it cannot
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        model.train(was_training)
    weight: Any = model.get_input_embeddings().weight
    full = weight.dtype == torch.float32 and not torch.is_autocast_enabled(logps.device.type)
    logps_bound, gradient_bound = BOUNDS[full]
    apart = (logps - expected).abs().mean().item()
    if not apart <= logps_bound:
        return f"log-probs differ from padded ones by {apart:.2g} on average"
    norm = expected_gradient.norm().clamp_min(1e-30)
    relative = ((gradient - expected_gradient).norm() / norm).item()
    if not relative <= gradient_bound:
        return f"gradients differ from padded ones by {relative:.2g}, relatively"
    return None


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
    used = [gradient.flatten().float() for gradient in gradients if gradient is not None]
    return logps.detach(), torch.cat(used) if used else logps.new_zeros(1)


def _first_layer(model: Any) -> list[Tensor]:
    """Trainable parameters of the first decoder layer, the ones that all of attention reaches."""
    layers = next(m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList))
    return [p for p in layers[0].parameters() if p.requires_grad]
