"""The pairs of an epoch in a line: tree after tree, cut into steps of exactly so many pairs.

Trees keep the order that they are given, but where a step's end would cut one, another of the next
few goes before it, if that makes the step exactly full. What still does not fit is cut: the rest of
the tree, its prompt and shared leaves computed once more, runs later. Where no pairs share a
prompt the line is the order itself.

Legend: M pairs in a line; G groups of them (steps, or shares of steps); a *piece* is a run of pairs
of one tree, which stay together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..data.table import PairLengths, TreeLengths


@dataclass(frozen=True)
class Line:
    """Pairs in a line, and where its groups and the pieces inside them begin and end."""

    pairs: np.ndarray  # [M]
    cuts: np.ndarray  # [pieces + 1], from 0 to M
    groups: np.ndarray  # [G + 1], likewise; every one a cut

    @property
    def sizes(self) -> np.ndarray:
        """[pieces] pairs of each."""
        return np.diff(self.cuts)

    @property
    def group(self) -> np.ndarray:
        """[pieces] the group of each."""
        return np.searchsorted(self.groups, self.cuts[:-1], side="right") - 1

    def tokens(self, lengths: PairLengths | TreeLengths, layout: str) -> np.ndarray:
        """[pieces] tokens that the decoder computes for each by itself."""
        count = len(self.cuts) - 1
        return lengths.computed(layout, self.pairs, np.repeat(np.arange(count), self.sizes), count)

    def sorted_by(self, places: np.ndarray, count: int) -> Line:
        """The line with its pieces sorted by their places, which become its groups."""
        order = np.argsort(places, kind="stable")
        by_pair = np.argsort(np.repeat(places, self.sizes), kind="stable")
        pairs = np.bincount(places, weights=self.sizes, minlength=count).astype(np.int64)
        return Line(self.pairs[by_pair], _bounds(self.sizes[order]), _bounds(pairs))

    def part(self, first: int, last: int, size: int) -> Line:
        """The pairs from ``first`` to ``last`` as groups of ``size``, the last perhaps smaller."""
        groups = np.append(np.arange(first, last, size), last)
        cuts = np.union1d(self.cuts[(self.cuts > first) & (self.cuts < last)], groups)
        return Line(self.pairs[first:last], cuts - first, groups - first)

    def no_heavier(self, lengths: PairLengths | TreeLengths, layout: str, limit: int) -> Line:
        """The line with pieces over a limit on tokens cut in halves, down to single pairs."""
        line = self
        while True:
            heavy = (line.tokens(lengths, layout) > limit) & (line.sizes > 1)
            if not heavy.any():
                return line
            middles = (line.cuts[:-1] + -(-line.sizes // 2))[heavy]
            line = Line(line.pairs, np.union1d(line.cuts, middles), line.groups)

    def at_least(self, pieces: int) -> Line:
        """The line with so many pieces in every group that has the pairs: the largest are cut."""
        counts = np.bincount(self.group, minlength=len(self.groups) - 1)
        few = np.flatnonzero((counts < pieces) & (counts < np.diff(self.groups)))
        if not len(few):
            return self
        middles = [cut for group in few for cut in self._middles(int(group), pieces)]
        cuts = np.union1d(self.cuts, np.array(middles, np.int64))
        return Line(self.pairs, cuts, self.groups)

    def _middles(self, group: int, pieces: int) -> Iterator[int]:
        low, high = self.groups[group : group + 2]
        first, last = np.searchsorted(self.cuts, [low, high])
        cuts = self.cuts[first : last + 1].tolist()
        while len(cuts) <= pieces and len(cuts) <= high - low:
            sizes = np.diff(cuts)
            place = int(sizes.argmax())
            middle = cuts[place] + -(-int(sizes[place]) // 2)
            cuts.insert(place + 1, middle)
            yield middle


def in_steps(lengths: PairLengths | TreeLengths, order: np.ndarray, size: int) -> Line:
    """All pairs in a line of one group.

    Args:
        order: [U] the trees as they should come.
        size: pairs of a step.
    """
    members = np.argsort(lengths.tree, kind="stable")
    sizes = np.bincount(lengths.tree, minlength=len(order))
    begins = np.cumsum(sizes) - sizes
    if sizes.max(initial=1) == 1:
        begins, sizes = begins[order], sizes[order]
    else:
        runs = [
            (begins[tree] + begin, end - begin)
            for tree, begin, end in _fitted(order.tolist(), sizes.tolist(), size)
        ]
        begins, sizes = np.array(runs, np.int64).reshape(-1, 2).T
    cuts = _bounds(sizes)
    places = np.arange(cuts[-1]) + np.repeat(begins - cuts[:-1], sizes)
    return Line(members[places], cuts, np.array([0, cuts[-1]]))


def _fitted(order: list[int], sizes: list[int], size: int) -> Iterator[tuple[int, int, int]]:
    """(tree, first, last of its pairs) of every piece, so that few cross the end of a step."""
    pieces = (
        (tree, begin, min(begin + size, sizes[tree]))
        for tree in order
        for begin in range(0, sizes[tree], size)
    )
    waiting: list[tuple[int, int, int]] = []
    pairs = 0
    while True:
        while pairs < 2 * size and (piece := next(pieces, None)) is not None:
            waiting.append(piece)
            pairs += piece[2] - piece[1]
        if not waiting:
            return
        room = min(size, pairs)
        counts = [end - begin for _, begin, end in waiting]
        taken = _filling(counts, room)
        placed = sum(counts[i] for i in taken)
        yield from (waiting[i] for i in taken)
        gone = set(taken)
        waiting = [piece for i, piece in enumerate(waiting) if i not in gone]
        if placed < room:  # none of them fits
            tree, begin, end = waiting[0]
            middle = begin + room - placed
            yield tree, begin, middle
            waiting[0] = tree, middle, end
        pairs -= room


def _filling(counts: list[int], room: int) -> list[int]:
    """Places of counts that fill the room, the earliest that do; else the first that fit in it."""
    sums = [1]  # of the counts from a place on, as bits
    for count in reversed(counts):
        sums.append(sums[-1] | sums[-1] << count)
    sums.reverse()
    full = bool(sums[0] >> room & 1)
    taken = []
    for place, count in enumerate(counts):
        if count <= room and (not full or sums[place + 1] >> (room - count) & 1):
            taken.append(place)
            room -= count
    return taken


def _bounds(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
