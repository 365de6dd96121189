"""Varlen attention over packed rows: no mask and no padding, prefixes shared.

Sequence s has queries ``cu_seq_lens_q[s] : cu_seq_lens_q[s + 1]`` of the row. Where answers share
their prompt, the queries of all but the first stand alone, and their keys and values are gathered
behind the prompt's (``kv_index``): the row then has the keys ``[prompt + leaf | prompt + leaf]``,
and so on, of every tree. Fewer queries than keys mean the last ones, so that causality, sliding
windows and softcaps fall out right in one call of any varlen kernel. Of a row that several ranks
share (``shared_row``, see `parallel.rows`) each rank computes some heads.

The function stands in the place of transformers' own under the *same* name and hands over to it
wherever no lengths are given: generation, other models and padded batches see no difference, and
gradient checkpointing, which looks the name up again in backward, finds the same function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

VARLEN_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "kv_index")


def takes_varlen(attention: str) -> None:
    """Teach transformers' attention of this name to take packed rows by their lengths.

    Flash-attention of any version keeps its own kernels. For "sdpa" it is torch's varlen attention
    on a GPU, and scaled_dot_product_attention sequence by sequence on a CPU.

    Raises:
        UserError: attention that computes with a mask only.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    if attention != "sdpa" and "flash" not in attention:
        raise UserError(
            f"cu_seq_lens_q: attention {attention!r} takes a mask, not lengths; use sdpa or "
            "flash_attention_2, or collate with rows='dense' ('blocks' for flex_attention)"
        )
    original = ALL_ATTENTION_FUNCTIONS[attention]
    if not hasattr(original, "without_varlen"):
        AttentionInterface.register(attention, _with_varlen(original, "flash" in attention))


def _with_varlen(original: Callable[..., Any], is_flash: bool) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers': query [1, heads, T, D], key, value -> [1, T, heads, D]."""
        if kwargs.get("cu_seq_lens_q") is None:
            if is_no_mask(attention_mask) and query.shape[2] > 1:
                raise UserError(
                    f"{type(module).__name__}: it does not hand the lengths of packed rows to its "
                    "attention; collate with rows='dense'"
                )
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        row, index = kwargs.pop("shared_row", None), kwargs.pop("kv_index", None)
        if row is not None:
            query, key, value = (row.some_heads(x) for x in (query, key, value))
        if index is not None:
            key, value = key.index_select(2, index), value.index_select(2, index)
        kwargs["sliding_window"] = _window(module, kwargs.get("sliding_window"))
        if is_flash:
            out = original(module, query, key, value, None, *args, **kwargs)[0]
        else:
            out = _sdpa_varlen(query, key, value, *args, **kwargs)
        return out if row is None else row.own_tokens(out), None

    attention.without_varlen = original  # pyright: ignore[reportFunctionMemberAccess]
    return attention


def is_no_mask(mask: Any) -> bool:
    """Whether this is the stand-in [1, 1, 1, 1] that comes with lengths instead of a mask."""
    return isinstance(mask, Tensor) and mask.shape == (1, 1, 1, 1)


def window_of(config: Any, kind: str | None = None) -> int | None:
    """The sliding window of layers of this ``layer_types`` kind, of all layers if it has none."""
    return None if kind == "full_attention" else getattr(config, "sliding_window", None)


def _window(module: Any, given: int | None) -> int | None:
    """A layer's window as its config says; not every family hands it to sdpa."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if config is None or layer is None:
        return given
    kinds = getattr(config, "layer_types", None)
    return window_of(config, None if kinds is None else kinds[layer])


def _sdpa_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UserError(f"attention: sdpa over packed rows has no {name}; use padded batches")
    if dropout:
        raise UserError("attention dropout: packed rows take none; set disable_dropout: true")
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in _cast(query, key, value))
    if query.device.type == "cpu":
        bounds = cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()
        return _by_sequence(query, key, value, bounds, scaling, sliding_window)[None]
    varlen_attn, groups_heads = torch_varlen()
    shared = {"enable_gqa": True} if groups_heads else {}
    if not groups_heads and query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **shared,
    )
    return out[None]


@cache
def torch_varlen() -> tuple[Callable[..., Any], bool]:
    """torch's varlen attention, and whether it takes fewer heads of keys than of queries.

    In torch 2.11 it has no word on the latter, and documents as many of both.
    """
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def knows_windows() -> bool:
    """Whether torch's varlen attention takes ``window_size``; its first versions did not."""
    return "window_size" in inspect.signature(torch_varlen()[0]).parameters


def _cast(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of autocast where it is on, as scaled_dot_product_attention would."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(kind)) for x in tensors]


def _by_sequence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[list[int], list[int]],
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Attention of each sequence in turn: [T, heads, D] from keys, values [K, kv heads, D]."""
    parts = []
    lengths = [[end - begin for begin, end in pairwise(b)] for b in bounds]
    for q, k, v in zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True
    ):
        mask = None
        if len(q) != len(k) or (window is not None and window < len(k)):
            last = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
            keys = torch.arange(len(k), device=q.device)
            mask = keys <= last
            if window is not None:
                mask &= keys > last - window
        out = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)
