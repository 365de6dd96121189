"""The forward's product by the vendor's library, a chunk of fp32 logits at a time, then statistics.

The chunk is written and read once, which costs memory traffic that the fused kernels do not have;
in exchange the product runs at the library's speed.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from widemargin.kernels.linear_logprob.routing import BLOCK, num_blocks
from widemargin.kernels.linear_logprob.tiles import Tile
from widemargin.kernels.linear_logprob.torch_forward import operand, product
from widemargin.kernels.linear_logprob.triton_forward import Statistics, profile_step
from widemargin.kernels.linear_logprob.triton_tile import (
    FUSED,
    add_bias,
    store_statistics,
    triton_dtype,
)
from widemargin.kernels.linear_logprob.types import HeadCall

TILE = Tile(128, 128, 2048, 8, 1)
"""``depth`` is the vocabulary rows of a chunk."""

WORKSPACE_BYTES = 256 * 2**20
"""Most memory for a chunk of logits."""


@triton.jit(do_not_specialize=["first_group", "N", "B", "every"])
def _statistics_kernel(
    logits_ptr, bias_ptr, targets_ptr,
    partial_lse_ptr, tops_ptr, target_logits_ptr, profile_ptr, counts_ptr,
    stride_ln, first_group, N, V, B, every, logit_scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TOPS: tl.constexpr, PROFILE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """One [ROWS, COLUMNS] tile of a chunk of logits; outputs as in `store_statistics`."""
    tile = tl.program_id(1)
    group = first_group + tl.program_id(0)
    offs_n = tile * ROWS + tl.arange(0, ROWS)
    offs_v = group * COLUMNS + tl.arange(0, COLUMNS)
    mask = (offs_n < N)[:, None] & (offs_v < V)[None, :]
    inside = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    logits_ptrs = logits_ptr + offs_n.to(tl.int64)[:, None] * stride_ln + inside[None, :]
    z = tl.load(logits_ptrs, mask=mask, other=0.0)
    z = add_bias(z, bias_ptr, offs_v, offs_v < V, HAS_BIAS, ROUND)
    store_statistics(
        z, tile, group, every, targets_ptr,
        partial_lse_ptr, tops_ptr, target_logits_ptr, profile_ptr, counts_ptr,
        N, V, B, logit_scale, softcap, ROWS, COLUMNS, WIDTH, HAS_SOFTCAP, TOPS, PROFILE,
    )  # fmt: skip


def launch(call: HeadCall, targets: Tensor, statistics: Statistics, tile: Tile) -> None:
    """``tile.depth`` vocabulary rows per chunk, fewer where they would not fit the workspace."""
    hidden, weight = call.hidden, call.weight
    rows, vocabulary = len(hidden), len(weight)
    chunk = min(tile.depth, max(BLOCK, WORKSPACE_BYTES // (4 * rows) // BLOCK * BLOCK))
    logits = statistics.partial_lse.new_empty(rows * min(chunk, vocabulary))
    left = operand(call, hidden)
    for start in range(0, vocabulary, chunk):
        part = operand(call, weight[start : start + chunk])
        z = logits[: rows * len(part)].view(rows, len(part))
        product(left, part.T, z)
        _statistics_kernel[(triton.cdiv(len(part), BLOCK), triton.cdiv(rows, tile.rows))](
            z, weight if call.bias is None else call.bias, targets, *statistics,
            z.stride(0), start // BLOCK, rows, vocabulary, num_blocks(vocabulary),
            profile_step(rows), call.logit_scale, 1.0 if call.softcap is None else call.softcap,
            ROWS=tile.rows, COLUMNS=BLOCK, WIDTH=BLOCK, HAS_BIAS=call.bias is not None,
            HAS_SOFTCAP=call.softcap is not None, **statistics.flags(),
            ROUND=triton_dtype(call.compute_dtype), **FUSED, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
