"""Tile sizes of the head's kernels by GPU architecture and width of the inputs' dtype.

No autotuning at run time. Entries compile for the chip without spills and within its shared memory
(`bench/compile/resources.py` lists them); none has been timed on a GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One kernel's launch: rows x columns of the output tile, depth of a step, warps, stages.

    ``together``, of the forward only: token tiles that take a vocabulary group in turn.
    ``descriptors``, of backward only: tensor descriptors in place of pointers, where the operands
    allow them (sm_90 and newer; no GPU has chosen between the two yet).
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    together: int = 16
    descriptors: bool = False


class Tiles(NamedTuple):
    """The head's kernels. ``columns`` of `forward` is a multiple of 128."""

    forward: Tile
    recompute: Tile
    d_weight: Tile
    d_hidden: Tile


HALF = {
    80: Tiles(
        forward=Tile(128, 256, 32, 8, 3),
        recompute=Tile(128, 128, 32, 4, 3),
        d_weight=Tile(128, 128, 64, 4, 3),
        d_hidden=Tile(128, 128, 64, 8, 3),
    ),
    90: Tiles(
        forward=Tile(128, 256, 64, 8, 3),
        recompute=Tile(128, 128, 64, 8, 3),
        d_weight=Tile(128, 256, 64, 8, 3),
        d_hidden=Tile(128, 128, 32, 4, 4),
    ),
}
"""bf16 and fp16, by compute capability; a newer chip takes the newest entry.

Where a kernel of 128 x 128 does not spill with 4 warps, or needs 128 registers with 8, two of its
blocks fit a multiprocessor, and one computes while the other loads.
"""

FULL = Tiles(
    forward=Tile(128, 128, 32, 8, 2),
    recompute=Tile(128, 128, 32, 8, 2),
    d_weight=Tile(128, 128, 32, 8, 2),
    d_hidden=Tile(128, 64, 32, 8, 2),
)
"""fp32 (IEEE products, no tensor cores), on every chip."""


def tiles_for(dtype: torch.dtype, device: torch.device) -> Tiles:
    """The table's entry for inputs of ``dtype`` on ``device``."""
    if dtype == torch.float32:
        return FULL
    major, minor = torch.cuda.get_device_capability(device)
    known = [capability for capability in HALF if capability <= 10 * major + minor]
    return HALF[max(known, default=min(HALF))]
