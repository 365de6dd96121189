"""Attention and the head for `simulation`: what the kernels keep and return, without computing it.

The head's bytes are those that `linear_logprob` takes beyond its inputs and results. Shapes: N
tokens, H hidden, V vocabulary, B = ceil(V / 128) blocks. The design's bound is ``2·N·B·4 + N·H·4``
bytes and a workspace of at most 256 MiB; ``partial_lse`` [B, N] is the first N·B of it and a result
of forward, so it is not counted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...kernels.linear_logprob.routing import BLOCK, num_blocks
from ..packing.varlen import _by_sequence, _cast
from ..parallel.groups import Place
from ..parallel.rows import SharedRow
from .batches import MicroBatch

NAME = "widemargin_plan"
WORKSPACE = 256 * 2**20
CHUNK = 1024, 2048
"""Tokens and vocabulary rows of one product of the torch head."""
FP32 = 4
ATTENDS, RECURS = "full_attention", "linear_attention"
"""Masks that a layer which does both asks for, whatever the config calls the layer."""


def attention_for(implementation: str, batch: MicroBatch, device: str) -> str:
    """The name under which transformers finds attention for this batch.

    eager and sdpa with dense masks are the real functions; all else is a stand-in.
    """
    from transformers.modeling_utils import AttentionInterface

    if _is_dense(implementation, batch, device):
        return "eager" if implementation == "eager" else "sdpa"
    AttentionInterface.register(NAME, _by_lengths(batch) if device == "cpu" else _kernel(batch))
    return NAME


def masks_for(
    implementation: str, batch: MicroBatch, config: Any, dtype: torch.dtype, device: str
) -> Any:
    """Masks as a packed or padded batch has them: one per kind of layer where there are several."""
    kinds = getattr(config, "layer_types", None)
    dense = _is_dense(implementation, batch, device)
    rows, length = (batch.rows, batch.length) if dense else (1, 1)
    of = dtype if implementation == "eager" else torch.bool
    if kinds is None:
        return torch.ones((rows, 1, length, length), dtype=of)
    masks = {kind: torch.ones((rows, 1, length, length), dtype=of) for kind in {*kinds, ATTENDS}}
    return masks | {RECURS: torch.ones((rows, length), dtype=torch.bool)}


def _is_dense(implementation: str, batch: MicroBatch, device: str) -> bool:
    if implementation == "eager":
        return True
    return batch.kind == "dense" and "flash" not in implementation


@contextmanager
def experts() -> Iterator[None]:
    """Products of experts by transformers' fallback: torch knows bfloat16's shapes alone."""
    from transformers.integrations import moe

    name = "_can_use_grouped_mm"
    before = getattr(moe, name, None)
    setattr(moe, name, lambda *_: False)
    try:
        yield
    finally:
        setattr(moe, name, before)


class _FusedAttention(torch.autograd.Function):
    """A flash kernel: q, k, v, the output and one logsumexp per query and head are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, _, lse = ctx.saved_tensors
        sums = torch.empty_like(lse)
        d_query = torch.empty_like(query, dtype=torch.float32)  # summed over blocks of keys
        gradients = tuple(torch.empty_like(x) for x in (query, key, value))
        del sums, d_query
        return gradients


def _kernel(batch: MicroBatch) -> Any:
    """A GPU's kernel over rows [1, heads, T, D], keys gathered where prompts are shared."""

    row = _shared_row(batch)

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        query, key, value = _half(*(_some_heads(row, x) for x in (query, key, value)))
        if batch.layout == "prefix_shared" and batch.kind == "varlen":
            index = torch.zeros(sum(batch.keys), dtype=torch.int64)
            key, value = key.index_select(2, index), value.index_select(2, index)
        elif batch.layout == "padded":  # padding is taken out, and put back into the output
            query, key, value = query.clone(), key.clone(), value.clone()
        out: Any = _FusedAttention.apply(query, key, value)
        return _own_tokens(row, out.transpose(1, 2).contiguous()), None

    return attention


def _by_lengths(batch: MicroBatch) -> Any:
    """A CPU's way: one sequence after the other."""
    bounds, row = (_bounds(batch.queries), _bounds(batch.keys)), _shared_row(batch)

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (_some_heads(row, x) for x in (query, key, value))
        if batch.layout == "prefix_shared":
            index = torch.zeros(sum(batch.keys), dtype=torch.int64)
            key, value = key.index_select(2, index), value.index_select(2, index)
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in _cast(query, key, value))
        window = kwargs.get("sliding_window")
        return _own_tokens(row, _by_sequence(q, k, v, bounds, scaling, window)[None]), None

    return attention


class _Unsent(SharedRow):
    """A shared row whose exchanges give tensors of the right size."""

    def exchanged(self, parts: Tensor) -> Tensor:
        return parts.clone(memory_format=torch.contiguous_format)


def _shared_row(batch: MicroBatch) -> SharedRow | None:
    alone = batch.sharing == 1
    return None if alone else _Unsent(Place(0, batch.sharing), sum(batch.queries))


def _some_heads(row: SharedRow | None, values: Tensor) -> Tensor:
    return values if row is None else row.some_heads(values)


def _own_tokens(row: SharedRow | None, values: Tensor) -> Tensor:
    return values if row is None else row.own_tokens(values)


def _bounds(lengths: tuple[int, ...]) -> list[int]:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


def _half(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of autocast where it is on, which is how these kernels are called."""
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    return [x.to(torch.get_autocast_dtype("cpu")) for x in tensors]


def head_forward(tokens: int, hidden: int, vocab: int, compute_bytes: int, backend: str) -> int:
    """Bytes inside the head's forward: a token tile's column sums (Triton), some logits (torch)."""
    if backend == "triton":
        return -(-tokens // BLOCK) * vocab * FP32
    chunk = min(tokens, CHUNK[0]) * min(vocab, CHUNK[1])
    return (chunk + tokens * num_blocks(vocab)) * FP32 + _operands(tokens, hidden, compute_bytes)


def head_backward(tokens: int, hidden: int, vocab: int, compute_bytes: int, backend: str) -> int:
    """Bytes inside the head's backward: masses [B, N], dH in fp32, and the workspace.

    The Triton head's sorted hidden states are gone before the result takes as much.
    """
    masses, blocks = tokens * num_blocks(vocab) * FP32, num_blocks(vocab)
    d_hidden = tokens * hidden * FP32
    if backend == "triton":
        cells = (blocks + 1) * -(-tokens // BLOCK) + 1
        work = cells * BLOCK * BLOCK * compute_bytes + 2 * blocks * hidden * FP32
        return masses + d_hidden + min(work, WORKSPACE)
    rows = min(tokens, CHUNK[0])
    buffers = CHUNK[0] * (CHUNK[1] + 2 * hidden) + rows + 2 * blocks * hidden
    in_place = compute_bytes == FP32  # dH is then what is returned
    rest = 0 if in_place else d_hidden + _operands(tokens, hidden, compute_bytes)
    return 2 * masses + masses // 4 + buffers * FP32 + rest


def _operands(tokens: int, hidden: int, compute_bytes: int) -> int:
    """The torch head's inputs widened to fp32 on a CPU: a chunk of W and the hidden states."""
    return 0 if compute_bytes == FP32 else (tokens * hidden + CHUNK[1] * hidden) * FP32


def head_bound(tokens: int, hidden: int, vocab: int) -> int:
    """The design's bound on all that the head takes, ``partial_lse`` included."""
    return 2 * tokens * num_blocks(vocab) * FP32 + tokens * hidden * FP32 + WORKSPACE


def full_logits(positions: int, vocab: int) -> int:
    """fp32 logits of all positions, their log-softmax, and its gradient: what the head avoids."""
    return 3 * positions * vocab * FP32
