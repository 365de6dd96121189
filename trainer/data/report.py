"""What became of the data: rows skipped and why, what was cut, how long pairs are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..text import printable
from .limits import CHOSEN_CUT, MISMATCH, REJECTED_CUT

EXAMPLES_SHOWN = 3
END_LOST = (CHOSEN_CUT, REJECTED_CUT)


@dataclass
class SourceCount:
    """How much of one split of one source was taken."""

    name: str
    split: str
    rows: int
    used: int

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
    #: Reason -> rows that cannot train.
    skipped: dict[str, int]
    #: The first few of them, each with its row and what was seen.
    examples: list[str]
    #: Name (see ``tokenizing.FLAGS``) -> pairs kept of which it is true, those that occur.
    flags: dict[str, int]
    #: The first few prompt mismatches, each with its row.
    mismatches: list[str]
    #: "prompt", "chosen", "rejected" -> statistics.
    lengths: dict[str, LengthStats]
    #: Pairs whose sides were swapped by ``flip``.
    flipped: int = 0

    def lines(self) -> Iterator[str]:
        skipped = self.rows - self.pairs
        yield f"{self.split}: {self.pairs:,} pairs of {self.rows:,} rows, {skipped:,} skipped"
        yield from (f"  from {printable(str(source))}" for source in self.sources)
        yield from (f"  skipped: {count:,} {reason}" for reason, count in self.skipped.items())
        yield from (f"    {printable(example, 300)}" for example in self.examples)
        if skipped > len(self.examples):
            yield f"    ... and {skipped - len(self.examples):,} more"
        for name, count in self.flags.items():
            lost = " (end-of-turn token lost)" if name in END_LOST else ""
            yield f"  {name}: {count:,} pairs{lost}"
            if name == MISMATCH:
                yield from (f"    {printable(example, 300)}" for example in self.mismatches)
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
