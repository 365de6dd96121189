"""Which pairs run together: optimizer steps, their micro-batches, and each rank's share of them.

A step is exactly the configured number of pairs, in an order that follows from seed and epoch (the
epoch's last step may be smaller). Its pairs are dealt twice, each time longest first to whoever
has the fewest tokens so far:

- for an objective that couples pairs, over the step's *global micro-batches* first, in equal
  counts, so that what such an objective sees follows from seed, epoch, step and the number of
  micro-batches alone; then each of those over the ranks;
- for any other, over the ranks first, in equal counts, and then each rank's over its micro-batches,
  heaviest first. The loss is the same mean over the step's pairs, and the ranks stay close in
  *every* micro-batch, where ZeRO-3 and FSDP make them wait for each other. (Real answers, 8 ranks,
  16 pairs each per step: with 2 pairs a micro-batch the heaviest rank is on average 4% above the
  mean, with one 8%; in the first way 12% and 96%.)

Global micro-batches go by prompt, chosen and rejected tokens, whatever the layout, so that every
layout sees the same ones; ranks go by what the layout in use computes. All of it is integer
arithmetic, the same on every rank.

Legend: K steps of S pairs, A micro-batches a step, R ranks; B bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..data.table import PairLengths
from ..errors import UserError

FULL = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Plan:
    """One epoch's micro-batches; number m of rank r is ``order[bounds[m·R + r]:]`` to the next."""

    order: np.ndarray  # [pairs used] int64
    bounds: np.ndarray  # [micro-batches · R + 1] int64
    steps: np.ndarray  # [steps + 1] int64, each step's first micro-batch
    ranks: int
    lengths: PairLengths

    def __len__(self) -> int:
        """Global micro-batches of the epoch."""
        return int(self.steps[-1])

    def share(self, micro_batch: int, rank: int) -> list[int]:
        """A rank's pairs of a global micro-batch; empty where there are too few to go round."""
        first = micro_batch * self.ranks + rank
        return self.order[self.bounds[first] : self.bounds[first + 1]].tolist()

    def shortest(self, micro_batch: int) -> int:
        """The pair with the fewest tokens of a global micro-batch."""
        ends = self.bounds[[micro_batch * self.ranks, (micro_batch + 1) * self.ranks]]
        together = self.order[ends[0] : ends[1]]
        return int(together[self.lengths.shared[together].argmin()])

    @cached_property
    def pairs(self) -> np.ndarray:
        """[micro-batches, R] how many pairs each rank has."""
        return np.diff(self.bounds).reshape(-1, self.ranks)

    @property
    def most_pairs(self) -> int:
        """The most pairs any rank has in a micro-batch."""
        return int(self.pairs.max(initial=0))

    def tokens(self, layout: str) -> np.ndarray:
        """[micro-batches, R] tokens that each rank's decoder computes in this layout."""
        alone = self.lengths.alone(layout)[self.order]
        filled = self.pairs.ravel() > 0
        tokens = np.zeros(self.pairs.size, np.int64)
        reduce = np.maximum if layout == "padded" else np.add
        tokens[filled] = reduce.reduceat(alone, self.bounds[:-1][filled])
        tokens = tokens.reshape(self.pairs.shape)
        return tokens * self.pairs if layout == "padded" else tokens


@dataclass(frozen=True)
class Planner:
    """Plans epochs; see the module's docstring.

    Args:
        lengths: of the data set's pairs.
        pairs_per_step: S, over all ranks and micro-batches.
        micro_batches: A, of a whole step.
        ranks: R.
        seed: of the order, to which the epoch is added; None keeps the data set's order.
        coupled: fix global micro-batches before ranks; see the module's docstring.
        layout: of the rows, by whose tokens ranks are balanced; see `PairLengths.alone`.
        drop_last: leave out what does not fill a global micro-batch at the epoch's end.

    Raises:
        UserError: ``drop_last`` leaves nothing.
    """

    lengths: PairLengths
    pairs_per_step: int
    micro_batches: int
    ranks: int = 1
    seed: int | None = 0
    coupled: bool = True
    layout: str = "prefix_shared"
    drop_last: bool = False

    def __post_init__(self) -> None:
        if len(self.lengths) and not self.micro_batches_per_epoch:
            raise UserError(
                f"dataloader_drop_last: {len(self.lengths)} pairs fill no micro-batch of "
                f"{self.pairs_per_step // self.micro_batches} pairs over all ranks; leave it out, "
                "or make batches smaller"
            )

    @property
    def whole_steps(self) -> int:
        return len(self.lengths) // self.pairs_per_step

    @property
    def tail(self) -> tuple[int, int]:
        """Pairs and global micro-batches of the epoch's last, smaller step; zeros for none."""
        size, rest = self.pairs_per_step, len(self.lengths) % self.pairs_per_step
        if self.drop_last:
            micro_batches = rest * self.micro_batches // size
            return micro_batches * size // self.micro_batches, micro_batches
        return rest, math.ceil(rest * self.micro_batches / size)

    @property
    def micro_batches_per_epoch(self) -> int:
        return self.whole_steps * self.micro_batches + self.tail[1]

    @property
    def steps_per_epoch(self) -> int:
        return self.whole_steps + (self.tail[1] > 0)

    def plan(self, epoch: int = 0) -> Plan:
        """The epoch's micro-batches, every pair in exactly one (but for ``drop_last``)."""
        order = self._order(epoch)
        computed = self.lengths.alone(self.layout)
        in_whole_steps = self.whole_steps * self.pairs_per_step
        rest, tail = self.tail
        parts = [
            (order[:in_whole_steps].reshape(-1, self.pairs_per_step), self.micro_batches),
            (order[in_whole_steps : in_whole_steps + rest][None], tail),
        ]
        pairs, bins, first = [], [], 0
        for steps, micro_batches in parts:
            if not steps.size:
                continue
            lengths = (self.lengths.shared[steps] if self.coupled else None, computed[steps])
            places = assign(*lengths, micro_batches, self.ranks)
            places += first + np.arange(len(steps))[:, None] * micro_batches * self.ranks
            first += len(steps) * micro_batches * self.ranks
            pairs.append(steps.ravel())
            bins.append(places.ravel())
        placed = np.concatenate(bins) if bins else np.zeros(0, np.int64)
        counts = np.bincount(placed, minlength=self.micro_batches_per_epoch * self.ranks)
        starts = np.arange(self.whole_steps + 1) * self.micro_batches
        return Plan(
            order=np.concatenate(pairs)[np.argsort(placed, kind="stable")] if pairs else placed,
            bounds=np.concatenate([[0], np.cumsum(counts)]),
            steps=np.append(starts, starts[-1] + tail) if tail else starts,
            ranks=self.ranks,
            lengths=self.lengths,
        )

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(len(self.lengths))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.lengths), generator=generator).numpy()


def assign(
    shared: np.ndarray | None, computed: np.ndarray, micro_batches: int, ranks: int
) -> np.ndarray:
    """The place of every pair of K steps: [K, S] numbers ``micro_batch · R + rank``.

    Args:
        shared: [K, S] int64, what global micro-batches go by; None to fix ranks first.
        computed: [K, S] int64, above 0, what ranks go by.
    """
    coupled = shared is not None
    outer, inner = (micro_batches, ranks) if coupled else (ranks, micro_batches)
    counts = even_shares(computed.shape[1], outer)
    first, _ = deal(shared if coupled else computed, outer, counts)
    members = _members(first, counts)  # [K, outer, most pairs], -1 where there is no pair
    real = members >= 0
    steps = np.broadcast_to(np.arange(len(computed))[:, None, None], members.shape)
    inside = np.where(real, computed[steps, members], 0)
    second, loads = deal(inside.reshape(-1, inside.shape[2]), inner)
    loads = loads.reshape(-1, outer, inner)
    names = _by_running_total(loads) if coupled else _heaviest_first(loads)
    second = np.take_along_axis(names, second.reshape(members.shape), axis=2)
    group = np.arange(outer)[:, None]
    places = group * ranks + second if coupled else second * ranks + group
    out = np.empty_like(computed)
    out[steps[real], members[real]] = places[real]
    return out


def even_shares(items: int, bins: int) -> np.ndarray:
    """[bins] whole numbers that sum to ``items`` and differ by one at most."""
    return np.diff(np.arange(bins + 1) * items // bins)


def deal(
    tokens: np.ndarray, bins: int, room: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Deal each row's items over ``bins``, longest first, each to the bin with the fewest tokens.

    Args:
        tokens: [G, M] int64; an item of 0 tokens stands for none.
        room: [bins] most items each bin takes; None for no limit.

    Returns:
        [G, M] each item's bin, and [G, bins] the bins' tokens.
    """
    rows = np.arange(len(tokens))
    load = np.zeros((len(tokens), bins), np.int64)
    # A bin without room looks as heavy as can be, and its true load is put back at the end.
    left = np.tile(np.full(bins, tokens.shape[1]) if room is None else room, (len(tokens), 1))
    seen = np.where(left > 0, 0, FULL)
    out = np.empty(tokens.shape, np.int64)
    for item in np.argsort(-tokens, axis=1, kind="stable").T:
        bin_ = seen.argmin(axis=1)
        out[rows, item] = bin_
        load[rows, bin_] += tokens[rows, item]
        left[rows, bin_] -= 1
        seen[rows, bin_] = np.where(left[rows, bin_] > 0, load[rows, bin_], FULL)
    return out, load


def _members(bins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[K, B, most] which items of each row are in each bin, -1 past the bin's count [B]."""
    order = np.argsort(bins, axis=1, kind="stable")
    columns = np.arange(counts.max())
    first = np.cumsum(counts) - counts
    place = np.where(columns < counts[:, None], first[:, None] + columns, -1)
    return np.where(place >= 0, order[:, place], -1)


def _heaviest_first(loads: np.ndarray) -> np.ndarray:
    """[K, outer, inner] new numbers of the inner bins: 0 for the one with the most tokens."""
    return np.argsort(np.argsort(-loads, axis=2, kind="stable"), axis=2, kind="stable")


def _by_running_total(loads: np.ndarray) -> np.ndarray:
    """[K, outer, inner] new numbers of the inner bins, so that their sums over outer even out."""
    names = np.empty(loads.shape, np.int64)
    total = np.zeros((len(loads), loads.shape[2]), np.int64)
    for place in range(loads.shape[1]):
        lightest = np.argsort(total, axis=1, kind="stable")
        heaviest = np.argsort(-loads[:, place], axis=1, kind="stable")
        np.put_along_axis(names[:, place], heaviest, lightest, axis=1)
        total += np.take_along_axis(loads[:, place], np.argsort(names[:, place], axis=1), axis=1)
    return names
