"""A rank's place among those that share its rows, and the process groups of a run.

Ranks 0 to n - 1 share each of their rows, and so do the next n (``sequence_parallel_size`` is n).
Such a group counts as one rank wherever pairs are dealt and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor


class Ranks(Protocol):
    """What the settings of a run say of its ranks."""

    sequence_parallel_size: int
    ddp_timeout: int

    @property
    def process_index(self) -> int: ...


@dataclass(frozen=True)
class Place:
    """This rank's place among the ``size`` ranks that share a row; workers get a copy."""

    rank: int
    size: int
    timeout_s: int = 1800

    @classmethod
    def of(cls, args: Ranks) -> Place | None:
        """None where each rank has rows of its own."""
        size = args.sequence_parallel_size
        return None if size == 1 else cls(args.process_index % size, size, args.ddp_timeout)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that share this one's rows; a collective of all ranks the first time."""
        return _groups(dist.group.WORLD, self.size, self.timeout_s)[0]

    def own_targets(self, select: np.ndarray) -> np.ndarray:
        """Which of the positions ``select`` [N] this rank has; see `rows`."""
        return np.flatnonzero(select % self.size == self.rank)

    def averaged(self, gradient: Tensor) -> Tensor:
        """The mean over the group, as engines make it of all ranks' gradients."""
        dist.all_reduce(gradient, group=self.group)
        return gradient / self.size


def data_group(args: Ranks) -> dist.ProcessGroup | None:
    """One rank of every group that shares rows, this one's among them; None for all ranks.

    Sums over it count each pair once. A collective of all ranks the first time.
    """
    size = args.sequence_parallel_size
    return None if size == 1 else _groups(dist.group.WORLD, size, args.ddp_timeout)[1]


@cache
def _groups(world: Any, size: int, timeout_s: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    ranks, timeout = range(dist.get_world_size(world)), timedelta(seconds=timeout_s)
    neighbours = [list(ranks[first : first + size]) for first in ranks[::size]]
    others = [list(ranks[place::size]) for place in range(size)]
    sequence, data = (
        dist.new_subgroups_by_enumeration(lists, timeout=timeout)[0]
        for lists in (neighbours, others)
    )
    return sequence, data  # pyright: ignore[reportReturnType]
