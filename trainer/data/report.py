"""Counts of the data: rows skipped and why, tokens cut, lengths of pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..text import printable
from .limits import CHOSEN_CUT, FLAGS, MISMATCH, OK, REJECTED_CUT, TEXT_LOST
from .table import TOKEN_COLUMNS

if TYPE_CHECKING:
    import pyarrow

    from .sources import Part

EXAMPLES_SHOWN = 3
END_LOST = (CHOSEN_CUT, REJECTED_CUT)


@dataclass
class SourceCount:
    """Rows used of one split of one source."""

    name: str
    split: str
    rows: int
    used: int
    #: What became of its columns, in words.
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        split = f" [{self.split}]" if self.split else ""
        return f"{self.name}{split}: {self.used:,} of {self.rows:,} rows"


@dataclass
class LengthStats:
    """Tokens of one part (prompt, chosen, rejected) over the pairs kept."""

    mean: float
    median: float
    p95: float
    max: int
    total: int

    def __str__(self) -> str:
        return (
            f"mean {self.mean:,.0f}, median {self.median:,.0f}, p95 {self.p95:,.0f}, "
            f"max {self.max:,}"
        )


@dataclass
class SplitReport:
    """Counts of one split: "train" or "evaluation"."""

    split: str
    sources: list[SourceCount]
    rows: int
    pairs: int
    #: Reason -> pairs that cannot train, or rows that make none.
    skipped: dict[str, int]
    #: The first few of them, each with its row and what was seen.
    examples: list[str]
    #: Name (see ``limits.FLAGS``) -> pairs kept of which it is true, those that occur.
    flags: dict[str, int]
    #: The first few prompt mismatches, each with its row.
    mismatches: list[str]
    #: The first few rows of which the chat template left text out.
    losses: list[str]
    #: "prompt", "chosen", "rejected" -> statistics.
    lengths: dict[str, LengthStats]
    #: Rows that give no pair.
    skipped_rows: int = 0
    #: Pairs that cannot train, of rows that give others.
    skipped_pairs: int = 0
    #: Pairs whose sides were swapped by ``flip``.
    flipped: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether every row trains as it was given, and there is nothing to say of it."""
        noted = any(source.notes for source in self.sources)
        return not (self.skipped or self.flags or noted)

    def lines(self) -> Iterator[str]:
        skipped = sum(self.skipped.values())
        more = f", and {self.skipped_pairs:,} pairs of the others" if self.skipped_pairs else ""
        yield (
            f"{self.split}: {self.pairs:,} pairs of {self.rows:,} rows, {self.skipped_rows:,} "
            f"skipped{more}"
        )
        for source in self.sources:
            yield f"  from {printable(str(source))}"
            yield from (f"    {printable(note, 300)}" for note in source.notes)
        yield from (f"  skipped: {count:,} {reason}" for reason, count in self.skipped.items())
        yield from (f"    {printable(example, 300)}" for example in self.examples)
        if skipped > len(self.examples):
            yield f"    ... and {skipped - len(self.examples):,} more"
        for name, count in self.flags.items():
            lost = " (end-of-turn token lost)" if name in END_LOST else ""
            yield f"  {name}: {count:,} pairs{lost}"
            examples = {MISMATCH: self.mismatches, TEXT_LOST: self.losses}.get(name, [])
            yield from (f"    {printable(example, 300)}" for example in examples)
        if self.flipped:
            yield f"  sides swapped by flip: {self.flipped:,} pairs"
        yield from (f"  tokens, {part}: {stats}" for part, stats in self.lengths.items())


@dataclass
class DataReport:
    """The report of everything loaded for a run."""

    train: SplitReport | None = None
    evaluation: SplitReport | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as readable text."""
        splits = [split for split in (self.train, self.evaluation) if split is not None]
        return [line for split in splits for line in split.lines()] + [
            f"note: {printable(note)}" for note in self.notes
        ]

    def as_dict(self) -> dict[str, Any]:
        """The report for ``run.json``."""
        return asdict(self)


def count_rows(
    split: str,
    sources: list[SourceCount],
    origins: list[tuple[Part, int]],
    arrow: pyarrow.Table,
    trains: np.ndarray,
) -> SplitReport:
    """The report of a split.

    Args:
        split: "train" or "evaluation".
        sources: what was taken of each.
        origins: of every pair, its part and its row's number there.
        arrow: all pairs as `token_columns` made them.
        trains: [pairs] whether a pair can train.
    """
    skipped = Counter(status for status in arrow["status"].to_pylist() if status != OK)
    rows = [(id(part), row) for part, row in origins]
    training = {row for row, train in zip(rows, trains, strict=True) if train}
    others = sum(row in training for row, train in zip(rows, trains, strict=True) if not train)

    def flagged(flag: str) -> np.ndarray:
        return trains & (arrow["flags"].to_numpy() >> FLAGS.index(flag) & 1 > 0)

    def first(rows: np.ndarray, why: Callable[[int], str]) -> list[str]:
        shown = [int(i) for i in np.flatnonzero(rows)[:EXAMPLES_SHOWN]]
        named = ((part.row_name(row), i) for i in shown for part, row in [origins[i]])
        return [f"{name}: {why(i)}" for name, i in named]

    return SplitReport(
        split,
        sources,
        rows=sum(source.used for source in sources),
        pairs=int(trains.sum()),
        skipped=dict(skipped.most_common()),
        examples=first(~trains, lambda i: _why(arrow, i)),
        flags=_flag_counts(arrow, trains),
        mismatches=first(flagged(MISMATCH), lambda i: arrow["detail"][i].as_py()),
        losses=first(flagged(TEXT_LOST), lambda i: arrow["detail"][i].as_py()),
        lengths=_lengths(arrow, trains),
        skipped_rows=len(set(rows) - training),
        skipped_pairs=others,
    )


def _why(arrow: pyarrow.Table, position: int) -> str:
    reason, detail = (arrow[column][position].as_py() for column in ("status", "detail"))
    return printable(f"{reason} ({detail})" if detail else reason, 300)


def _flag_counts(arrow: pyarrow.Table, trains: np.ndarray) -> dict[str, int]:
    flags = arrow["flags"].to_numpy()[trains]
    counts = {name: int((flags >> i & 1).sum()) for i, name in enumerate(FLAGS)}
    return {name: count for name, count in counts.items() if count}


def _lengths(arrow: pyarrow.Table, trains: np.ndarray) -> dict[str, LengthStats]:
    stats = {}
    for column in TOKEN_COLUMNS:
        chunks = [np.diff(chunk.offsets.to_numpy()) for chunk in arrow[column].chunks]
        stats[column.removesuffix("_ids")] = _length_stats(np.concatenate(chunks)[trains])
    return stats


def _length_stats(lengths: np.ndarray) -> LengthStats:
    if not len(lengths):
        return LengthStats(0.0, 0.0, 0.0, 0, 0)
    mean, (median, p95) = round(float(lengths.mean()), 1), np.percentile(lengths, [50, 95])
    return LengthStats(mean, float(median), float(p95), int(lengths.max()), int(lengths.sum()))
