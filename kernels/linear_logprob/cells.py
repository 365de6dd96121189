"""Routing for the GPU: cells of 128 tokens by 128 vocabulary rows, listed without the host.

Tokens are sorted by their number of active blocks, heaviest first, and cut into tiles. A cell is
computed when enough of its tokens are active in the block, or one holds much mass; what remains
goes to the tail. Sorted tiles need no gathers inside the products and no atomics.

An entry is one element of the logits' gradient that is exact on its own: a target, or a block's
largest element (its top) where it counts and its cell is not computed. Entries are listed twice, by
block for dW and by token for dH, at places that prefix sums give.

Shapes: N tokens, V vocabulary, B vocabulary blocks, T tiles of tokens, S slices of the workspace, E
entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .routing import BLOCK, TOP_CUT, num_blocks, target_grads
from .types import EntropyGrad, HeadCall, Saved

TILE = 128
"""Tokens per tile."""
ENOUGH = 16
"""Active tokens from which a cell is computed (one in eight in a smaller tile); also by how much
one token's mass may exceed ``tail_eps`` before its cell is computed for it alone."""


ENTRIES = 128
"""Entries a token for which there is memory, targets apart; a token of a real model has 6 to 54."""
LEVELS = 4
"""Bounds of tops, each four times the one before, of which the first that fits the memory is taken;
where none does, no top is an entry, and its mass is routed with its block's."""


class Entries(NamedTuple):
    """Both lists of entries; memory past their ends is not read.

    By block: places [E] int32, ``BLOCK * place + column`` of each, of the sorted tokens, and their
    place_grads [E]; block_bounds [B + 1]. By sorted token: rows [E] int32, of the weight, and their
    row_grads [E]; token_bounds [N + 1].
    """

    places: Tensor
    place_grads: Tensor
    block_bounds: Tensor
    rows: Tensor
    row_grads: Tensor
    token_bounds: Tensor


class Routing(NamedTuple):
    """What backward computes, and what is left to the tail.

    order: [N] int64, tokens sorted by active blocks. flags: [B, T] bool, the cells to compute.
    weighted: [B, N], ``-g`` times the mass of all that is neither in a computed cell nor an entry,
    of the sorted tokens; None without a tail. stats: [4], see `HeadStats`.
    """

    order: Tensor
    flags: Tensor
    weighted: Tensor | None
    entries: Entries
    stats: Tensor


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


def every_cell(
    call: HeadCall,
    saved: Saved,
    grad: Tensor,
    scored: Tensor,
    entropy: EntropyGrad | None = None,
) -> Routing:
    """Every cell, tokens in their own order; the entries are the targets. Args: as in `choose`."""
    tokens, blocks = len(scored), num_blocks(len(call.weight))
    order = torch.arange(tokens, device=scored.device)
    flags = scored.new_ones(blocks, -(-tokens // TILE))
    stats = torch.zeros(4, dtype=saved.lse.dtype, device=scored.device)
    stats[0], stats[3] = scored.any(), 1.0
    targets = saved.targets
    scale, entropy = call.logit_scale, entropy and entropy.scaled(call.logit_scale)
    target_grad = target_grads(call, grad * scale, saved.logps, targets.clamp_min(0), entropy)
    target_blocks = torch.div(targets, BLOCK, rounding_mode="floor")
    by_block = torch.argsort(target_blocks, stable=True)
    every = torch.arange(blocks + 1, device=order.device)
    entries = Entries(
        places=(by_block * BLOCK + targets[by_block] % BLOCK).int(),
        place_grads=target_grad[by_block],
        block_bounds=torch.searchsorted(target_blocks[by_block], every, out_int32=True),
        rows=targets.int(),
        row_grads=target_grad,
        token_bounds=torch.arange(tokens + 1, device=order.device, dtype=torch.int32),
    )
    return Routing(order, flags, None, entries, stats)


def top_cut(levels: Tensor) -> Tensor:
    """From which part of the bound of an active pair tops are entries, as a device scalar."""
    fits = levels.sum((1, 2), dtype=torch.int64) <= ENTRIES * levels.shape[2]
    cuts = TOP_CUT * 4.0 ** torch.arange(LEVELS + 1, device=levels.device, dtype=torch.float32)
    cuts[-1] = torch.inf
    return cuts.gather(0, (~fits).sum()[None])


def capacity_of(tokens: int, blocks: int) -> int:
    """Entries for which there is memory."""
    return tokens * (1 + min(ENTRIES, blocks))


def starts(counts: Tensor) -> Tensor:
    """Where each count's entries begin, flat, and their total last, int32."""
    return pad(counts.flatten().cumsum(0, dtype=torch.int32), (1, 0))


def cell_stats(flags: Tensor, averaged: Tensor, scored: Tensor) -> Tensor:
    """As `routing.routing_stats`; averaged [N] and scored [N] are of the sorted tokens."""
    blocks, tiles = flags.shape
    missing = tiles * TILE - len(scored)
    per_tile = torch.nn.functional.pad(scored, (0, missing)).view(tiles, TILE).sum(1)
    count = per_tile.sum()
    each = (flags * per_tile).sum() / (count * blocks).clamp_min_(1)
    mass = torch.where(scored, averaged, 0.0)
    top = mass.max() if mass.numel() else mass.sum()
    dense = (flags | (per_tile == 0)).all()
    mean = mass.sum() / count.clamp_min(1)
    return torch.stack([each.to(mass.dtype), mean, top, dense.to(mass.dtype)])
