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

What is dealt are trees: the pairs of a step that share a prompt stay together, so that it runs
once. They are cut only where a step ends (see `line`), where there would be fewer of them than
micro-batches or ranks, and where a limit on tokens asks for it. A pair that shares its prompt with
no other is a tree by itself.

Where a loss is that of a tree (`TreeLengths`), trees are in all of this what pairs are otherwise: a
step is a number of trees, and none is ever cut.

Legend: K steps of S pairs, A micro-batches a step, R ranks; U trees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..data.table import PairLengths, TreeLengths
from ..errors import UserError
from .line import Line, in_steps

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
        tokens = self.lengths.computed(layout, self.order, self.places, self.pairs.size)
        return tokens.reshape(self.pairs.shape)

    @cached_property
    def places(self) -> np.ndarray:
        """[pairs used] ``m·R + r`` of every pair of ``order``."""
        return np.repeat(np.arange(self.pairs.size), self.pairs.ravel())

    @property
    def trees(self) -> tuple[int, int]:
        """Trees of the pairs, and how many a micro-batch's rank has of them, summed: those cut."""
        tree = self.lengths.tree[self.order]
        count = int(tree.max(initial=-1)) + 1
        return len(np.unique(tree)), len(np.unique(self.places * count + tree))


@dataclass(frozen=True)
class Planner:
    """Plans epochs; see the module's docstring.

    Args:
        lengths: of the data set's pairs, or of their trees in the place of pairs.
        pairs_per_step: S, over all ranks and micro-batches.
        micro_batches: A, of a whole step.
        ranks: R.
        seed: of the order, to which the epoch is added; None keeps the data set's order.
        coupled: fix global micro-batches before ranks; see the module's docstring.
        layout: of the rows, by whose tokens ranks are balanced; see `PairLengths.alone`.
        drop_last: leave out what does not fill a global micro-batch at the epoch's end.
        most_tokens: a tree that takes more in this layout is cut in pieces.

    Raises:
        UserError: ``drop_last`` leaves nothing.
    """

    lengths: PairLengths | TreeLengths
    pairs_per_step: int
    micro_batches: int
    ranks: int = 1
    seed: int | None = 0
    coupled: bool = True
    layout: str = "prefix_shared"
    drop_last: bool = False
    most_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(self.lengths) and not self.micro_batches_per_epoch:
            raise UserError(
                f"dataloader_drop_last: {len(self.lengths)} {self.lengths.noun}s fill no "
                f"micro-batch of {self.pairs_per_step // self.micro_batches} over all ranks; leave "
                "it out, or make batches smaller"
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
        line = in_steps(self.lengths, self._order(epoch), self.pairs_per_step)
        in_whole_steps = self.whole_steps * self.pairs_per_step
        rest, tail = self.tail
        pairs, bins, first = [], [], 0
        for begin, end, micro_batches in (
            (0, in_whole_steps, self.micro_batches),
            (in_whole_steps, in_whole_steps + rest, tail),
        ):
            if begin == end:
                continue
            steps = line.part(begin, end, self.pairs_per_step)
            dealt, places = self._assign(steps, micro_batches)
            pairs.append(dealt)
            bins.append(first + places)
            first += (len(steps.groups) - 1) * micro_batches * self.ranks
        placed = np.concatenate(bins) if bins else np.zeros(0, np.int64)
        order = np.concatenate(pairs)[np.argsort(placed, kind="stable")] if pairs else placed
        lengths = self.lengths
        if isinstance(lengths, TreeLengths):
            order, sizes = lengths.pairs_of(order)
            placed = np.repeat(np.sort(placed), sizes)
            lengths = lengths.pairs
        counts = np.bincount(placed, minlength=self.micro_batches_per_epoch * self.ranks)
        starts = np.arange(self.whole_steps + 1) * self.micro_batches
        return Plan(
            order=order,
            bounds=np.concatenate([[0], np.cumsum(counts)]),
            steps=np.append(starts, starts[-1] + tail) if tail else starts,
            ranks=self.ranks,
            lengths=lengths,
        )

    def _order(self, epoch: int) -> np.ndarray:
        """[U] the trees of the epoch."""
        trees = int(self.lengths.tree.max(initial=-1)) + 1
        if self.seed is None:
            return np.arange(trees)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(trees, generator=generator).numpy()

    def _assign(self, line: Line, micro_batches: int) -> tuple[np.ndarray, np.ndarray]:
        """Deal a line of K steps: its pairs in another order, and each one's place.

        Places are numbered step by step, ``micro_batch · R + rank`` inside a step.
        """
        steps = len(line.groups) - 1
        if self.most_tokens is not None:
            line = line.no_heavier(self.lengths, self.layout, self.most_tokens)
        outer, inner = micro_batches, self.ranks
        if not self.coupled:
            outer, inner = inner, outer
        shared = "prefix_shared" if self.coupled else self.layout
        line, _ = self._dealt(line, outer, shared, even=True)
        line, loads = self._dealt(line, inner, self.layout, even=False)
        loads = loads.reshape(steps, outer, inner)
        names = _by_running_total(loads) if self.coupled else _heaviest_first(loads)
        step, first, _ = np.indices(loads.shape)
        micro_batch, rank = (first, names) if self.coupled else (names, first)
        places = (step * micro_batches + micro_batch) * self.ranks + rank
        return line.pairs, np.repeat(places.ravel(), np.diff(line.groups))

    def _dealt(self, line: Line, bins: int, layout: str, *, even: bool) -> tuple[Line, np.ndarray]:
        """The line with every group dealt over bins, which become its groups, and their tokens.

        Args:
            layout: of the tokens to go by.
            even: give the bins equal counts of pairs, as far as trees stay together.
        """
        line = line.at_least(bins)
        groups, group = len(line.groups) - 1, line.group
        column = np.arange(len(group)) - np.searchsorted(group, group)
        tokens, pairs = np.zeros((2, groups, int(column.max()) + 1), np.int64)
        tokens[group, column] = line.tokens(self.lengths, layout)
        pairs[group, column] = line.sizes
        room = even_shares(int(line.groups[1]), bins) if even else None
        place, loads = deal(tokens, bins, room, pairs)
        return line.sorted_by(group * bins + place[group, column], groups * bins), loads


def even_shares(items: int, bins: int) -> np.ndarray:
    """[bins] whole numbers that sum to ``items`` and differ by one at most."""
    return np.diff(np.arange(bins + 1) * items // bins)


def deal(
    tokens: np.ndarray,
    bins: int,
    room: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Deal each row's items over ``bins``, longest first, each to the bin with the fewest tokens.

    Args:
        tokens: [G, M] int64; an item of 0 tokens stands for none.
        room: [bins] sizes that each bin takes; an item that fits in none goes where most room is
            left. None for no limit.
        sizes: [G, M] int64, what the items take of it; 1 each if None.

    Returns:
        [G, M] each item's bin, and [G, bins] the bins' tokens.
    """
    rows = np.arange(len(tokens))
    load = np.zeros((len(tokens), bins), np.int64)
    left = None if room is None else np.tile(room, (len(tokens), 1))
    sizes = np.ones_like(tokens) if sizes is None else sizes
    out = np.empty(tokens.shape, np.int64)
    for item in np.argsort(-tokens, axis=1, kind="stable").T:
        size = sizes[rows, item]
        bin_ = load.argmin(axis=1)
        if left is not None:
            fits = left >= size[:, None]
            lightest = np.where(fits, load, FULL).argmin(axis=1)
            bin_ = np.where(fits.any(axis=1), lightest, left.argmax(axis=1))
            left[rows, bin_] -= size
        out[rows, item] = bin_
        load[rows, bin_] += tokens[rows, item]
    return out, load


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
