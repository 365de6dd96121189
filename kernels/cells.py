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

from .routing import Routed, active_pairs, block_masses

TILE = 128
"""Tokens per tile."""
ENOUGH = 16
"""Active tokens from which a cell is computed (one in eight in a smaller tile); also by how much
one token's mass may exceed ``tail_eps`` before its cell is computed for it alone."""


class Cells(NamedTuple):
    """The cells to compute, by block and then tile, cut into slices that fit the workspace.

    order: [N] int64, tokens sorted. blocks, tiles: [B T] int32, of each cell. by_tile: [B T] int32,
    cells by tile and then block. slices: [S + 1] int32, first cell of each. block_bounds: [B + 1]
    int32, first cell of each block. block_slices: [B] int32. tile_bounds: [T, S + 1] int32, where
    each tile's cells of each slice begin in ``by_tile``.
    """

    order: Tensor
    blocks: Tensor
    tiles: Tensor
    by_tile: Tensor
    slices: Tensor
    block_bounds: Tensor
    block_slices: Tensor
    tile_bounds: Tensor


def choose_cells(
    partial_lse: Tensor,
    lse: Tensor,
    logps: Tensor,
    targets: Tensor,
    grad: Tensor,
    scored: Tensor,
    tail_eps: float,
) -> tuple[Routed, Tensor, Tensor]:
    """What is computed, per pair (`Routed`, tokens in their own order), order [N], flags [B, T].

    With ``tail_eps`` 0 (``tail="exact"``) every cell is.
    """
    blocks, tokens = partial_lse.shape
    tiles = -(-tokens // TILE)
    if tail_eps == 0:
        order = torch.arange(tokens, device=lse.device)
        flags = torch.ones(blocks, tiles, dtype=torch.bool, device=lse.device)
        everything = torch.ones_like(partial_lse, dtype=torch.bool)
        return Routed(everything, torch.zeros_like(partial_lse)), order, flags
    masses = block_masses(partial_lse, lse, logps, targets)
    active = active_pairs(masses, grad, scored, tail_eps)
    alone = active_pairs(masses, grad, scored, ENOUGH * tail_eps)
    order = torch.argsort(active.sum(0), descending=True, stable=True)
    missing = tiles * TILE - tokens

    def tiled(pairs: Tensor) -> Tensor:
        return torch.nn.functional.pad(pairs[:, order], (0, missing)).view(blocks, tiles, TILE)

    sizes = (tokens - TILE * torch.arange(tiles, device=order.device)).clamp_(max=TILE)
    enough = (sizes * ENOUGH // TILE).clamp_(min=1)
    flags = (tiled(active).sum(2) >= enough) | tiled(alone).any(2)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=order.device))
    computed = flags[:, place // TILE]
    return Routed(computed, masses.masked_fill_(computed, 0.0)), order, flags


def slice_count(blocks: int, tiles: int, capacity: int) -> int:
    """Slices that always suffice: each holds whole blocks and at most ``capacity`` cells."""
    return max(1, -(-blocks * tiles // max(capacity - tiles, 1)))


def list_cells(flags: Tensor, order: Tensor, capacity: int) -> Cells:
    """Turn flags [B, T] into lists by prefix sums; sizes stay on the device.

    Args:
        capacity: cells that fit the workspace; more than T.
    """
    blocks, tiles = flags.shape
    slices = slice_count(blocks, tiles, capacity)
    counts = flags.sum(1)
    block_bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    block_slices = torch.div(block_bounds[:-1], max(capacity - tiles, 1), rounding_mode="floor")
    steps = torch.arange(slices + 1, device=flags.device)
    first_blocks = torch.searchsorted(block_slices, steps)
    by_block, block_of, tile_of = _compact(flags)
    by_tile, _, _ = _compact(flags.T, torch.where(flags, by_block, 0).T)
    per_slice = torch.zeros(tiles, slices, dtype=torch.int64, device=flags.device)
    per_slice.index_add_(1, block_slices, flags.T.long())
    inside = torch.nn.functional.pad(per_slice.cumsum(1), (1, 0))
    before = per_slice.sum(1).cumsum(0) - per_slice.sum(1)
    return Cells(
        order=order,
        blocks=block_of.int(),
        tiles=tile_of.int(),
        by_tile=by_tile.int(),
        slices=block_bounds[first_blocks].int(),
        block_bounds=block_bounds.int(),
        block_slices=block_slices.int(),
        tile_bounds=(before[:, None] + inside).int(),
    )


def _compact(flags: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """List the set flags [R, C] in order, by prefix sums.

    Returns:
        each flag's place in the list [R, C]; the list's rows and columns [R C] (zeros past its
        end). With ``values`` [R, C], their list in place of the first.
    """
    flat = flags.reshape(-1)
    place = flat.cumsum(0) - 1
    slots = torch.where(flat, place, len(flat))

    def listed(what: Tensor) -> Tensor:
        out = torch.zeros(len(flat) + 1, dtype=torch.int64, device=flags.device)
        return out.scatter_(0, slots, what.reshape(-1))[:-1]

    rows, columns = torch.meshgrid(
        *(torch.arange(n, device=flags.device) for n in flags.shape), indexing="ij"
    )
    first = place.view(flags.shape) if values is None else listed(values)
    return first, listed(rows), listed(columns)
