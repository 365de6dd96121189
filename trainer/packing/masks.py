"""Attention for packed rows: one mask per kind of layer, or lengths for varlen attention.

A row holds several *segments* (see `PairCollator`): sequences, or trees laid out as a prompt and
its leaves, each a branch. A token sees the tokens before it of its own segment that are of the
prompt or of its own branch; where a layer has a sliding window, those less than a window of
*positions* away.

The masks come from the attention implementation's own factory and are built once per forward,
inside the patched model (`model.head`), so that only integer tensors cross DDP, FSDP
and ZeRO. Models are unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .recurrent import RECURRENT, has_no_attention, is_recurrent, keep_sequences_apart
from .varlen import VARLEN_ARGUMENTS, takes_varlen, window_of


def packed_arguments(
    model: Any,
    arguments: dict[str, Any],
    segment_ids: Tensor | None,
    branch_ids: Tensor | None,
) -> dict[str, Any]:
    """The decoder's arguments for packed rows: with the attention mask they need.

    Args:
        model: the causal language model.
        arguments: those of its forward; ``position_ids`` [B, T] among them (or [4, B, T], the
            first in the token's sequence), and for varlen attention ``cu_seq_lens_q`` and the rest
            of what `PairCollator` gives.
        segment_ids: [B, T]; -1 on padding.
        branch_ids: [B, T]: 0 prompt, leaves from 1 on; None where no prefix is shared.

    Raises:
        UserError: arguments that do not fit together, or that the model's attention cannot take.
    """
    config = model.config.get_text_config()
    positions = arguments.get("position_ids")
    if positions is None:
        raise UserError("position_ids: packed rows need them, [B, T], counted in each sequence")
    if arguments.get("attention_mask") is not None:
        raise UserError(
            "attention_mask: expected none beside segment_ids, which say what sees what"
        )
    if arguments.get("cu_seq_lens_q") is not None:
        if is_recurrent(config):
            keep_sequences_apart(model)
        if not has_no_attention(config):
            takes_varlen(config._attn_implementation)
        return arguments | {"attention_mask": _no_mask(config, positions.device)}
    if segment_ids is None:
        raise UserError("segment_ids: packed rows without cu_seq_lens_q need them, [B, T]")
    if "flash" in config._attn_implementation:
        raise UserError(
            f"segment_ids: {config._attn_implementation} takes no mask; collate with rows='varlen'"
        )
    arguments = {n: value for n, value in arguments.items() if n not in VARLEN_ARGUMENTS}
    if branch_ids is None:
        branch_ids = torch.zeros_like(segment_ids)
    dtype = model.get_input_embeddings().weight.dtype
    in_sequence = positions if positions.dim() == 2 else positions[0]
    masks = pair_masks(config, segment_ids, branch_ids, in_sequence, dtype)
    return arguments | {"attention_mask": masks}


def pair_masks(
    config: Any, segments: Tensor, branches: Tensor, positions: Tensor, dtype: torch.dtype
) -> Any:
    """The masks of packed rows, as the config's attention implementation takes them.

    Args:
        config: a text model's.
        segments, branches, positions: [B, T], see `PairCollator`.
        dtype: of the hidden states; eager's mask is added to scores.

    Returns:
        One mask ([B, 1, T, T], or a ``BlockMask`` for flex attention), or a dictionary with one per
        type of layer where the config has ``layer_types``.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    factory = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    rows, length = segments.shape

    def build(window: int | None) -> Any:
        def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
            same = (segments[b, q] == segments[b, k]) & ((segments[b, q] >= 0) | (q == k))
            shared = (branches[b, k] == 0) | (branches[b, k] == branches[b, q])
            mask = (k <= q) & same & shared
            if window is None:
                return mask
            return mask & (positions[b, k] > positions[b, q] - window)

        return factory(
            batch_size=rows,
            q_length=length,
            kv_length=length,
            mask_function=allowed,
            allow_is_causal_skip=False,
            dtype=dtype,
            device=segments.device,
            config=config,
        )

    if getattr(config, "layer_types", None) is None:
        return build(window_of(config))
    return {kind: build(window_of(config, kind)) for kind in set(config.layer_types)}


def _no_mask(config: Any, device: torch.device) -> Any:
    """A stand-in that keeps a model from making its own mask; see `varlen.is_no_mask`."""
    stub = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    if has_no_attention(config):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return stub
    masks: dict[str, Tensor | None] = dict.fromkeys(kinds, stub)
    if is_recurrent(config):  # mixed layers look two masks up, under these names
        masks |= {"full_attention": stub, **dict.fromkeys(RECURRENT)}
    return masks
