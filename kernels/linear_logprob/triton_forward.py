"""Triton forward of the head: one tiled product whose epilogue keeps statistics, never logits.

Three ways to the product, of which `tiles.py` names one per chip: pointers here, tensor descriptors
in `triton_forward_tma.py`, the vendor's library in `library_forward.py`.

Shapes: N tokens, H hidden, V vocabulary, B blocks of 128 vocabulary rows, T tiles of tokens.
The mathematics stand in `linear_logprob.py`.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import library_forward, triton_forward_tma
from .routing import BLOCK, num_blocks
from .tiles import Tile, Tiles, tiles_for
from .torch_forward import Head
from .triton_tile import inner_contiguous, logits_tile, store_statistics, triton_dtype


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
    counts [T, B], sums per token tile, with no columns where no profile is wanted."""

    partial_lse: Tensor
    target_logits: Tensor
    profile: Tensor
    counts: Tensor


def forward(
    head: Head, targets: Tensor, *, keep: bool, profile: bool, tiles: Tiles | None = None
) -> tuple[Tensor, ...]:
    """As `torch_head.forward`: logps [N], lse [N], partial_lse [B, N], profile [V] or empty.

    Args:
        tiles: in place of the chip's own, for benchmarks.
    """
    tiles = tiles or tiles_for(head.compute_dtype, head.hidden.device)
    tile = tiles.forward
    if head.softcap is not None:
        tile = tile._replace(columns=BLOCK)
    hidden, weight = inner_contiguous(head.hidden), inner_contiguous(head.weight)
    rows, vocabulary = len(hidden), len(weight)
    blocks, token_tiles = num_blocks(vocabulary), triton.cdiv(rows, tile.rows)

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    found = Statistics(
        new(blocks, rows),
        new(rows),
        new(token_tiles, vocabulary if profile else 0),
        new(token_tiles, blocks if profile else 0),
    )
    if rows:
        _product(tiles.product, head)(head, hidden, weight, targets, found, tile)
    lse = found.partial_lse.logsumexp(0)
    profiles = found.profile.sum(0)
    if profile:
        total = found.counts.sum(0).clamp_min_(1)
        total = total.repeat_interleave(BLOCK, output_size=blocks * BLOCK)
        profiles /= total[:vocabulary]
    partial_lse = found.partial_lse if keep else found.partial_lse[:0]
    return found.target_logits - lse, lse, partial_lse, profiles


def _product(name: str, head: Head):
    if name == "descriptors" and triton_forward_tma.takes(head):
        return triton_forward_tma.launch
    return library_forward.launch if name == "library" else _launch


def _launch(
    head: Head, hidden: Tensor, weight: Tensor, targets: Tensor, found: Statistics, tile: Tile
) -> None:
    (rows, width), vocabulary = hidden.shape, len(weight)
    tiles, groups = triton.cdiv(rows, tile.rows), triton.cdiv(vocabulary, tile.columns)
    together = min(tiles, tile.together)
    _forward_kernel[(together, groups, triton.cdiv(tiles, together))](
        hidden, weight, weight if head.bias is None else head.bias, targets, *found,
        hidden.stride(0), weight.stride(0), rows, width, vocabulary, num_blocks(vocabulary),
        head.logit_scale, 1.0 if head.softcap is None else head.softcap,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WIDTH=BLOCK,
        HAS_BIAS=head.bias is not None,
        HAS_SOFTCAP=head.softcap is not None, PROFILE=found.profile.numel() > 0,
        ROUND=triton_dtype(head.compute_dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
