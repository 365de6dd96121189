"""The largest micro-batch of a rank as numbers: rows, tokens, what attention sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..batching.planner import Plan
from ..data.table import PairLengths
from ..packing.choose import Packing
from ..packing.layout import place_dense, row_length


@dataclass(frozen=True)
class MicroBatch:
    """Shapes that `PairCollator` would give for some pairs, or one of several ranks of them.

    ``queries`` and ``keys`` are each sequence's lengths for varlen attention, () elsewhere.
    """

    layout: str
    kind: str  # of the rows, see `Packing.rows`
    rows: int
    length: int
    scored: int  # tokens through the head
    queries: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    sharing: int = 1  # ranks that share the row

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def of_a_rank(self, sharing: int) -> MicroBatch:
        """The part of a rank, where so many share the row; attention still has its lengths."""
        length, scored = (-(-each // sharing) for each in (self.length, self.scored))
        return replace(self, length=length, scored=scored, sharing=sharing)


def micro_batch(lengths: PairLengths, packing: Packing) -> MicroBatch:
    """The batch of all these pairs (at least one)."""
    every = np.arange(len(lengths))
    forest = lengths.unfold(every, np.zeros_like(every))
    sequences, scored = forest.totals, int(forest.completion.sum())
    layout = packing.layout
    if layout == "padded":
        return MicroBatch(layout, "dense", len(sequences), int(sequences.max()), scored)
    totals = sequences if layout == "packed" else forest.tree_tokens
    if packing.rows == "dense":
        _, (rows, length) = place_dense(totals, packing.area_cost)
        return MicroBatch(layout, "dense", rows, length, scored)
    length = int(totals.sum())
    if packing.rows == "blocks":
        length = row_length(length, packing.shortest_row)
        return MicroBatch(layout, "blocks", 1, length, scored)
    queries = keys = sequences
    if layout == "prefix_shared":
        queries, keys = (part[forest.by_tree] for part in (forest.branch_tokens, sequences))
    return MicroBatch(
        layout, "varlen", 1, length, scored, tuple(queries.tolist()), tuple(keys.tolist())
    )


def largest(plan: Plan, packing: Packing) -> MicroBatch:
    """The micro-batch of one rank with the most tokens in an epoch's plan."""
    tokens = plan.tokens(packing.layout)
    place, rank = np.unravel_index(int(tokens.argmax()), tokens.shape)
    pairs = plan.share(int(place), int(rank))
    batch = micro_batch(plan.lengths.take(np.array(pairs)), packing)
    return batch if packing.place is None else batch.of_a_rank(packing.place.size)
