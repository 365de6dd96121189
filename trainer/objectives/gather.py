"""Numbers of all ranks' pairs, in the order of their pair ids.

Objectives whose loss couples pairs need statistics over a whole global micro-batch. One padded
all-gather brings every rank the same rows; sorting them by pair id and summing in an order that
ignores padding makes the arithmetic the same, bit for bit, on any number of ranks.

Shapes: P pairs of this rank, G rows over all ranks (padding included), C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SUM_WIDTH = 256


@dataclass(frozen=True)
class GlobalPairs:
    """All ranks' pairs: the usable ones first, by pair id, then zeros."""

    values: Tensor  # [G, C] fp64
    count: Tensor  # [] int64, rows in use
    mine: Tensor  # [P] int64, the row of each of this rank's pairs

    @property
    def used(self) -> Tensor:
        """[G] bool."""
        return torch.arange(len(self.values), device=self.values.device) < self.count

    def mean(self, column: int = 0) -> Tensor:
        """[] mean of a column; 0 without pairs."""
        return padded_sum(self.values[:, column]) / self.count.clamp(min=1)

    def std(self, column: int = 0) -> Tensor:
        """[] unbiased standard deviation of a column; 0 for fewer than two pairs."""
        squares = torch.where(self.used, (self.values[:, column] - self.mean(column)) ** 2, 0.0)
        return (padded_sum(squares) / (self.count - 1).clamp(min=1)).sqrt()


def gather_pairs(
    values: Tensor, ids: Tensor, group: dist.ProcessGroup | None, max_pairs_per_rank: int | None
) -> GlobalPairs:
    """Gather ``values`` [P, C] of the pairs ``ids`` [P] over ``group`` (None: this process alone).

    A pair with a negative id (a filler) or a value that is not finite is left out, so that one bad
    pair cannot spoil the statistics of a whole run.
    """
    values = values.detach().double()
    usable = (ids >= 0) & values.isfinite().all(1)
    # An id up to 2**53 is exact in fp64, so one tensor carries it along; -1 marks an unused row.
    packed = torch.cat([values, ids[:, None].double()], 1)
    packed = torch.where(usable[:, None], packed, _unused_rows(packed, len(packed)))
    first = 0
    if group is not None:
        capacity = max_pairs_per_rank
        if capacity is None:
            capacity = _largest(len(ids), ids.device, group)
        packed = _all_gather(packed, capacity, group)
        first = capacity * dist.get_rank(group)
    gathered_ids = packed[:, -1]
    order = torch.argsort(gathered_ids.masked_fill(gathered_ids < 0, torch.inf), stable=True)
    rows = torch.argsort(order)
    return GlobalPairs(
        values=packed[order, :-1],
        count=(gathered_ids >= 0).sum(),
        mine=rows[first : first + len(ids)],
    )


def _largest(pairs: int, device: torch.device, group: dist.ProcessGroup) -> int:
    """The most pairs any rank has. Waits for the device: set ``max_pairs_per_rank`` to avoid it."""
    size = torch.tensor(pairs, device=device)
    dist.all_reduce(size, op=dist.ReduceOp.MAX, group=group)
    return int(size.item())


def _all_gather(packed: Tensor, capacity: int, group: dist.ProcessGroup) -> Tensor:
    pairs = len(packed)
    if pairs > capacity:
        raise ValueError(
            f"max_pairs_per_rank: {capacity}, but this rank has {pairs} pairs; raise it to the "
            "largest number of pairs a rank can get"
        )
    mine = torch.cat([packed, _unused_rows(packed, capacity - pairs)])
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, mine, group=group)
    return torch.cat(ranks)


def _unused_rows(like: Tensor, count: int) -> Tensor:
    """[count, C + 1]: zeros, which add nothing to a sum, with the id -1."""
    rows = like.new_zeros((count, like.shape[1]))
    rows[:, -1] = -1.0
    return rows


def padded_sum(x: Tensor) -> Tensor:
    """Sum of ``x`` [G] in an order that trailing zeros do not change: the same bits for any G.

    ``x.sum()`` groups its terms by the length of ``x``, so padding would change its rounding.
    """
    first, *others = pad_to_multiple(x).split(SUM_WIDTH)
    for row in others:
        first = first + row
    return first.sum()


def pad_to_multiple(x: Tensor) -> Tensor:
    """``x`` [G] with zeros appended up to a multiple of 256, at least 256."""
    missing = SUM_WIDTH - len(x) if len(x) < SUM_WIDTH else -len(x) % SUM_WIDTH
    return torch.nn.functional.pad(x, (0, missing)) if missing else x
