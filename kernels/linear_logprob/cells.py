"""Routing for the GPU: cells of 128 tokens by 128 vocabulary rows, listed without the host.

Tokens are sorted by their number of active blocks, heaviest first, and cut into tiles. A cell is
computed when enough of its tokens are active in the block, or one holds much mass; what remains
goes to the tail. Sorted tiles need no gathers inside the products and no atomics.

Shapes: N tokens, B vocabulary blocks, T tiles of tokens, S slices of the workspace.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 128
"""Tokens per tile."""
ENOUGH = 16
"""Active tokens from which a cell is computed (one in eight in a smaller tile); also by how much
one token's mass may exceed ``tail_eps`` before its cell is computed for it alone."""


class Cells(NamedTuple):
    """The cells to compute, by block and then tile, cut into slices that fit the workspace.

    cells: [B T + 1], ``block * T + tile`` of each. by_tile, tile_blocks: [B T + 1], the cells by
    tile and then block: their places in ``cells``, and their blocks. slices, slice_blocks: [S + 1],
    first cell and first block of each slice. by_count: [B], each slice's blocks, most cells first.
    block_bounds: [B + 1], first cell of each block. tile_bounds: [T, S + 1], where each tile's
    cells of each slice begin in ``by_tile``. All int64.
    """

    cells: Tensor
    by_tile: Tensor
    tile_blocks: Tensor
    slices: Tensor
    slice_blocks: Tensor
    by_count: Tensor
    block_bounds: Tensor
    tile_bounds: Tensor


def slice_count(blocks: int, tiles: int, capacity: int) -> int:
    """Slices that always suffice: each holds whole blocks and at most ``capacity`` cells."""
    return max(1, -(-blocks * tiles // max(capacity - tiles, 1)))


def list_cells(flags: Tensor, capacity: int) -> Cells:
    """Turn flags [B, T] into lists by prefix sums; sizes stay on the device.

    Args:
        capacity: cells that fit the workspace; more than T.
    """
    blocks, tiles = flags.shape
    total = blocks * tiles
    counts = flags.sum(1)
    block_bounds = pad(counts.cumsum(0), (1, 0))
    block_slices = torch.div(block_bounds[:-1], max(capacity - tiles, 1), rounding_mode="floor")
    every = torch.arange(total + 1, device=flags.device)
    slice_blocks = torch.searchsorted(
        block_slices, every[: slice_count(blocks, tiles, capacity) + 1]
    )
    above = pad(flags.cumsum(0), (0, 0, 1, 0))
    starts = above[-1].cumsum(0) - above[-1]
    tile_places = above.add_(starts)  # of the first cell at or below each block, in by_tile
    flat = flags.reshape(-1)
    places = flat.cumsum(0) - 1
    # One more than there can be, where the rest goes, and which a kernel that reads ahead may read.
    slots = torch.where(flat, places, total)
    tile_slots = torch.where(flat, tile_places[:-1].reshape(-1), total)
    nothing = torch.zeros_like(every)
    return Cells(
        cells=nothing.scatter(0, slots, every[:-1]),
        by_tile=nothing.scatter(0, tile_slots, places),
        tile_blocks=nothing.scatter(0, tile_slots, every[:-1] // tiles),
        slices=block_bounds[slice_blocks],
        slice_blocks=slice_blocks,
        by_count=torch.argsort(block_slices * (tiles + 1) + tiles - counts, stable=True),
        block_bounds=block_bounds,
        tile_bounds=tile_places[slice_blocks].T.contiguous(),
    )
