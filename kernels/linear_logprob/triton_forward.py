"""Triton forward of the head: one tiled product whose epilogue keeps statistics, never logits.

Shapes: N tokens, H hidden, V vocabulary, B blocks of 128 vocabulary rows, T tiles of tokens.
The mathematics stand in `function.py`.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .routing import BLOCK, num_blocks
from .tiles import Tile, tiles_for
from .triton_tile import inner_contiguous, logits_tile, store_statistics, triton_dtype
from .types import HeadCall, Saved


@triton.jit(do_not_specialize=["N", "B"])
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr,
    partial_lse_ptr, target_logits_ptr, profile_ptr, counts_ptr,
    stride_hn, stride_wv, N, H, V, B, logit_scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PROFILE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """One [ROWS, COLUMNS] tile; outputs as in `store_statistics`.

    Axis 0 of the grid is the token tiles that take a vocabulary group (axis 1) in turn before the
    next group, so that both operands of what runs at one time stay in the cache.
    """
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    group = tl.program_id(1)
    if tile * ROWS >= N:
        return
    offs_n = tile * ROWS + tl.arange(0, ROWS)
    offs_v = group * COLUMNS + tl.arange(0, COLUMNS)
    z = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, offs_n < N, offs_v < V,
        stride_hn, stride_wv, H, logit_scale, ROWS, COLUMNS, DEPTH, HAS_BIAS, ROUND,
    )  # fmt: skip
    store_statistics(
        z, tile, group, targets_ptr, partial_lse_ptr, target_logits_ptr, profile_ptr, counts_ptr,
        N, V, B, softcap, ROWS, COLUMNS, WIDTH, HAS_SOFTCAP, PROFILE,
    )  # fmt: skip


class Statistics(NamedTuple):
    """What the product's epilogue writes. partial_lse [B, N]; target_logits [N]; profile [T, V] and
    counts [T, B], sums per token tile, with no columns without a profile."""

    partial_lse: Tensor
    target_logits: Tensor
    profile: Tensor
    counts: Tensor


Launch = Callable[[HeadCall, Tensor, Statistics, Tile], None]
"""Computes the logits of a call whose targets are [N], and writes their statistics."""


def forward(call: HeadCall, targets: Tensor, *, keep: bool, profile: bool, tops: bool) -> Saved:
    """As `torch_forward.forward`, with the tile that `tiles.py` has for the chip."""
    tile = tiles_for(call.compute_dtype, call.hidden.device).forward
    return forward_by(launch, tile, call, targets, keep=keep, profile=profile, tops=tops)


def forward_by(
    launch: Launch,
    tile: Tile,
    call: HeadCall,
    targets: Tensor,
    *,
    keep: bool,
    profile: bool,
    tops: bool,
) -> Saved:
    """As `forward`, with another tile or another way to the logits: benchmarks compare them."""
    if call.softcap is not None:
        tile = tile._replace(columns=BLOCK)
    call = call._replace(hidden=inner_contiguous(call.hidden), weight=inner_contiguous(call.weight))
    rows, vocabulary = len(call.hidden), len(call.weight)
    blocks, token_tiles = num_blocks(vocabulary), triton.cdiv(rows, tile.rows)

    def new(*shape: int) -> Tensor:
        return call.hidden.new_empty(shape, dtype=torch.float32)

    statistics = Statistics(
        new(blocks, rows),
        new(rows),
        new(token_tiles, vocabulary if profile else 0),
        new(token_tiles, blocks if profile else 0),
    )
    if rows:
        launch(call, targets, statistics, tile)
    lse = statistics.partial_lse.logsumexp(0)
    profiles = statistics.profile.sum(0)
    if profile:
        total = statistics.counts.sum(0).clamp_min_(1)
        total = total.repeat_interleave(BLOCK, output_size=blocks * BLOCK)
        profiles /= total[:vocabulary]
    partial_lse = statistics.partial_lse if keep else statistics.partial_lse[:0]
    none = partial_lse.new_zeros(blocks if tops else 0, rows, dtype=torch.int32)
    return Saved(targets, statistics.target_logits - lse, lse, partial_lse, profiles, none)


def launch(call: HeadCall, targets: Tensor, statistics: Statistics, tile: Tile) -> None:
    """The chip's product, by pointers; ``hidden`` and ``weight`` have contiguous rows."""
    hidden, weight = call.hidden, call.weight
    (rows, width), vocabulary = hidden.shape, len(weight)
    tiles, groups = triton.cdiv(rows, tile.rows), triton.cdiv(vocabulary, tile.columns)
    together = min(tiles, tile.together)
    _forward_kernel[(together, groups, triton.cdiv(tiles, together))](
        hidden, weight, weight if call.bias is None else call.bias, targets, *statistics,
        hidden.stride(0), weight.stride(0), rows, width, vocabulary, num_blocks(vocabulary),
        call.logit_scale, 1.0 if call.softcap is None else call.softcap,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WIDTH=BLOCK,
        HAS_BIAS=call.bias is not None,
        HAS_SOFTCAP=call.softcap is not None, PROFILE=statistics.profile.numel() > 0,
        ROUND=triton_dtype(call.compute_dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
