"""Triton forward of the head: one tiled product whose epilogue keeps statistics, never logits.

Shapes: N tokens, H hidden, V vocabulary, B blocks of 128 vocabulary rows, T tiles of tokens.
The mathematics stand in `function.py`.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .extras import BlockSums
from .routing import BLOCK, num_blocks
from .tiles import Tile, tiles_for
from .triton_tile import (
    FUSED,
    inner_contiguous,
    logits_tile,
    store_block_sums,
    store_statistics,
    triton_dtype,
)
from .types import Asked, HeadCall, Saved

PROFILE_ALL = 1024
"""Tokens below which all of them make the profile."""


@triton.jit(do_not_specialize=["N", "B", "every"])
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr,
    partial_lse_ptr, tops_ptr, target_logits_ptr, profile_ptr, counts_ptr, block_sums_ptr,
    stride_hn, stride_wv, N, H, V, B, every, logit_scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TOPS: tl.constexpr, PROFILE: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEANS: tl.constexpr, TOP1: tl.constexpr,
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
        stride_hn, stride_wv, H, ROWS, COLUMNS, DEPTH, HAS_BIAS, ROUND,
    )  # fmt: skip
    if ENTROPY or SQUARES or MEANS or TOP1:
        store_block_sums(
            z, tile, group, block_sums_ptr, N, V, B, logit_scale, softcap,
            ROWS, COLUMNS, WIDTH, HAS_SOFTCAP, ENTROPY, SQUARES, MEANS, TOP1,
        )  # fmt: skip
    store_statistics(
        z, tile, group, every, targets_ptr,
        partial_lse_ptr, tops_ptr, target_logits_ptr, profile_ptr, counts_ptr,
        N, V, B, logit_scale, softcap, ROWS, COLUMNS, WIDTH, HAS_SOFTCAP, TOPS, PROFILE,
    )  # fmt: skip


class Statistics(NamedTuple):
    """What the product's epilogue writes.

    partial_lse: [B, N]. tops: [B, N] int32, see `Saved`, or no rows. target_logits: [N], NaN where
    a target is outside the vocabulary. profile: [S, V] and counts: [S, B], sums of S token tiles;
    no columns without a profile.
    """

    partial_lse: Tensor
    tops: Tensor
    target_logits: Tensor
    profile: Tensor
    counts: Tensor

    def flags(self) -> dict[str, bool]:
        """Which of them a kernel is to write."""
        return {"TOPS": self.tops.numel() > 0, "PROFILE": self.profile.numel() > 0}


Launch = Callable[[HeadCall, Tensor, Statistics, Tile], None]
"""Computes the logits of a call whose targets are [N], and writes their statistics."""


def forward(
    call: HeadCall,
    targets: Tensor,
    *,
    keep: bool,
    profile: bool,
    tops: bool,
    asked: Asked | None = None,
) -> Saved:
    """As `torch_forward.forward`, with the tile that `tiles.py` has for the chip."""
    tile = tiles_for(call.compute_dtype, call.hidden.device).forward
    if asked is None:
        return forward_by(launch, tile, call, targets, keep=keep, profile=profile, tops=tops)
    vocabulary = len(call.weight)
    shape = num_blocks(vocabulary), len(call.hidden)
    like = call.hidden.new_empty(1, dtype=torch.float32).expand(shape)
    sums = BlockSums(asked, like)
    launch_both = partial(launch, asked=asked, block_sums=sums.values)
    saved = forward_by(
        launch_both, tile_of_extras(tile), call, targets, keep=True, profile=profile, tops=tops
    )
    saved = saved._replace(extras=sums.extras(saved, vocabulary))
    return saved if keep else saved._replace(partial_lse=saved.partial_lse[:0])


def tile_of_extras(tile: Tile) -> Tile:
    """The forward's tile where `Extras` are asked for: a smaller one has registers for them."""
    return tile._replace(rows=64, columns=BLOCK)


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
    call = _positive_scale(call)
    call = call._replace(hidden=inner_contiguous(call.hidden), weight=inner_contiguous(call.weight))
    rows, vocabulary = len(call.hidden), len(call.weight)
    blocks, token_tiles = num_blocks(vocabulary), triton.cdiv(rows, tile.rows)
    sampled = triton.cdiv(token_tiles, profile_step(rows))

    def new(*shape: int) -> Tensor:
        return call.hidden.new_empty(shape, dtype=torch.float32)

    statistics = Statistics(
        partial_lse=new(blocks, rows),
        tops=call.hidden.new_empty((blocks if tops else 0, rows), dtype=torch.int32),
        target_logits=new(rows).fill_(torch.nan),
        profile=new(sampled, vocabulary if profile else 0),
        counts=new(sampled, blocks if profile else 0),
    )
    if rows:
        launch(call, targets, statistics, tile)
    lse = statistics.partial_lse.logsumexp(0)
    profiles = statistics.profile.sum(0)
    if profile:
        total = statistics.counts.sum(0).clamp_min_(1)
        total = total.repeat_interleave(BLOCK, output_size=blocks * BLOCK)
        profiles /= total[:vocabulary]
    return Saved(
        targets=targets,
        logps=statistics.target_logits - lse,
        lse=lse,
        partial_lse=statistics.partial_lse if keep else statistics.partial_lse[:0],
        profile=profiles,
        tops=statistics.tops,
    )


def profile_step(rows: int) -> int:
    """Of how many token tiles one adds to the profile: a quarter of many tokens tells as much."""
    return 4 if rows >= PROFILE_ALL else 1


def _positive_scale(call: HeadCall) -> HeadCall:
    """The same logits by a ``logit_scale`` above 0, with which a block's largest stays largest."""
    if call.logit_scale > 0:
        return call
    sign = -1.0 if call.logit_scale else 0.0
    return call._replace(
        hidden=call.hidden * sign,
        bias=None if call.bias is None else call.bias * sign,
        logit_scale=abs(call.logit_scale) or 1.0,
    )


def launch(
    call: HeadCall,
    targets: Tensor,
    statistics: Statistics,
    tile: Tile,
    asked: Asked | None = None,
    block_sums: Tensor | None = None,
) -> None:
    """The chip's product, by pointers; ``hidden`` and ``weight`` have contiguous rows.

    Args:
        asked, block_sums: see `extras.BlockSums`.
    """
    hidden, weight = call.hidden, call.weight
    (rows, width), vocabulary = hidden.shape, len(weight)
    tiles, groups = triton.cdiv(rows, tile.rows), triton.cdiv(vocabulary, tile.columns)
    together = min(tiles, tile.together)
    _forward_kernel[(together, groups, triton.cdiv(tiles, together))](
        hidden, weight, weight if call.bias is None else call.bias, targets, *statistics,
        statistics.partial_lse if block_sums is None else block_sums,
        hidden.stride(0), weight.stride(0), rows, width, vocabulary, num_blocks(vocabulary),
        profile_step(rows), call.logit_scale, 1.0 if call.softcap is None else call.softcap,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WIDTH=BLOCK,
        HAS_BIAS=call.bias is not None, HAS_SOFTCAP=call.softcap is not None, **statistics.flags(),
        **dict(zip(("ENTROPY", "SQUARES", "MEANS", "TOP1"), asked or Asked(), strict=True)),
        ROUND=triton_dtype(call.compute_dtype),
        **FUSED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
