"""The forward's product by tensor descriptors (TMA) and a persistent grid, for sm_90 and newer.

On sm_80 it compiles to code that does not pipeline.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from widemargin.kernels.linear_logprob import triton_forward
from widemargin.kernels.linear_logprob.routing import BLOCK, num_blocks
from widemargin.kernels.linear_logprob.tiles import Tile, Tiles
from widemargin.kernels.linear_logprob.triton_forward import Statistics, profile_step
from widemargin.kernels.linear_logprob.triton_tile import (
    FUSED,
    add_bias,
    described_product,
    descriptors,
    store_statistics,
    triton_dtype,
)
from widemargin.kernels.linear_logprob.types import HeadCall

TILE = Tile(128, 256, 64, 8, 4)
"""On sm_90, in half precision."""


@triton.jit
def tile_of(unit, tiles, groups, TOGETHER: tl.constexpr):
    """The (token tile, vocabulary group) of a unit of work.

    TOGETHER token tiles take a vocabulary group in turn before the next group, so that both
    operands of what runs at one time stay in the cache.
    """
    width = TOGETHER * groups
    first = unit // width * TOGETHER
    size = tl.minimum(tiles - first, TOGETHER)
    return first + unit % width % size, unit % width // size


@triton.jit(do_not_specialize=["N", "B", "tiles", "groups", "every"])
def _forward_tma_kernel(
    hidden_desc, weight_desc, bias_ptr, targets_ptr,
    partial_lse_ptr, tops_ptr, target_logits_ptr, profile_ptr, counts_ptr,
    N, H, V, B, tiles, groups, every, logit_scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TOPS: tl.constexpr, PROFILE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] tiles, dealt in turn; outputs as in `store_statistics`."""
    for unit in range(tl.program_id(0), tiles * groups, tl.num_programs(0)):
        tile, group = tile_of(unit, tiles, groups, TOGETHER)
        z = described_product(
            hidden_desc, weight_desc, tile * ROWS, group * COLUMNS, H, ROWS, COLUMNS, DEPTH
        )
        offs_v = group * COLUMNS + tl.arange(0, COLUMNS)
        z = add_bias(z, bias_ptr, offs_v, offs_v < V, HAS_BIAS, ROUND)
        store_statistics(
            z, tile, group, every, targets_ptr,
            partial_lse_ptr, tops_ptr, target_logits_ptr, profile_ptr, counts_ptr,
            N, V, B, logit_scale, softcap, ROWS, COLUMNS, WIDTH, HAS_SOFTCAP, TOPS, PROFILE,
        )  # fmt: skip


def with_descriptors(tiles: Tiles) -> Tiles:
    """The same tiles, with backward by descriptors too."""
    described = [tile._replace(descriptors=True) for tile in tiles[1:]]
    return Tiles(tiles.forward, *described)


def launch(call: HeadCall, targets: Tensor, statistics: Statistics, tile: Tile) -> None:
    """As `triton_forward.launch`, which steps in where descriptors cannot be made."""
    hidden, weight = call.hidden, call.weight
    described = descriptors(
        call.compute_dtype,
        (hidden, [tile.rows, tile.depth]),
        (weight, [tile.columns, tile.depth]),
    )
    if None in described:
        triton_forward.launch(call, targets, statistics, tile)
        return
    (rows, width), vocabulary = hidden.shape, len(weight)
    tiles, groups = triton.cdiv(rows, tile.rows), triton.cdiv(vocabulary, tile.columns)
    _forward_tma_kernel[(min(tiles * groups, _units(hidden.device)),)](
        *described, weight if call.bias is None else call.bias, targets, *statistics,
        rows, width, vocabulary, num_blocks(vocabulary), tiles, groups,
        profile_step(rows), call.logit_scale, 1.0 if call.softcap is None else call.softcap,
        ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WIDTH=BLOCK,
        TOGETHER=tile.together, HAS_BIAS=call.bias is not None,
        HAS_SOFTCAP=call.softcap is not None, **statistics.flags(),
        ROUND=triton_dtype(call.compute_dtype),
        **FUSED, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _units(device: torch.device) -> int:
    """One program per multiprocessor: a tile's accumulators fill its registers."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
