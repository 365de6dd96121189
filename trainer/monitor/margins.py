"""Histograms of margins over pairs: the file that evaluations append to, and reading it back.

Bins are fixed, so that evaluations, ranks and seeds add up: edges are ``SCALE * sinh(WIDTH * k)``
for k from -320 to 320, fine around zero (0.0025) and a fortieth of the value far from it, out to
149; what lies beyond counts in the last bin. One edge is zero, and a bin has its upper edge.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..files import parse_json

MARGINS_FILE = "margins.jsonl"
KINDS: tuple[str, ...] = ("reward_margins", "target_margins")
SCALE, WIDTH, BINS = 0.1, 0.025, 640
EDGES = [SCALE * math.sinh(WIDTH * (k - BINS // 2)) for k in range(BINS + 1)]
"""Of the bins, BINS + 1 numbers."""


@dataclass(frozen=True)
class Histogram:
    """Counts of pairs by bin, BINS of them."""

    counts: list[int]

    @property
    def pairs(self) -> int:
        return sum(self.counts)

    @property
    def spread(self) -> bool:
        """Whether there is more than one value to be seen."""
        return sum(1 for count in self.counts if count) > 1

    def share_above_zero(self) -> float:
        return sum(self.counts[BINS // 2 :]) / self.pairs

    def below(self, value: float) -> float:
        """The share of pairs up to ``value``, taking a bin's pairs as spread evenly over it."""
        seen = 0.0
        for count, low, high in zip(self.counts, EDGES[:-1], EDGES[1:], strict=True):
            if high > value:
                return (seen + count * max(0.0, value - low) / (high - low)) / self.pairs
            seen += count
        return 1.0

    def quantile(self, share: float) -> float:
        """The value that this share of pairs lies below, as exactly as the bins tell."""
        rank, totals = share * self.pairs, list(accumulate(self.counts))
        k = next((i for i, total in enumerate(totals) if total >= rank and total), BINS - 1)
        inside = (rank - (totals[k] - self.counts[k])) / (self.counts[k] or 1)
        return EDGES[k] + (EDGES[k + 1] - EDGES[k]) * min(max(inside, 0.0), 1.0)

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram([a + b for a, b in zip(self.counts, other.counts, strict=True)])


def line_of(step: int, histograms: dict[str, list[int]]) -> str:
    """One evaluation as a line of the file; runs of empty bins at either end are left out."""
    entry: dict[str, Any] = {"step": step, "scale": SCALE, "width": WIDTH, "bins": BINS}
    for kind, counts in histograms.items():
        filled = [i for i, count in enumerate(counts) if count]
        first, end = (filled[0], filled[-1] + 1) if filled else (0, 0)
        entry[kind] = {"first": first, "counts": counts[first:end]}
    return json.dumps(entry) + "\n"


def read_margins(run_dir: Path) -> dict[str, dict[float, Histogram]]:
    """Histograms by kind and step; a step's last line counts, broken ones are passed over."""
    histograms: dict[str, dict[float, Histogram]] = {kind: {} for kind in KINDS}
    path = run_dir / MARGINS_FILE
    for entry in json_lines(path):
        step = entry.get("step")
        same_bins = (entry.get("scale"), entry.get("width"), entry.get("bins"))
        if not isinstance(step, int) or same_bins != (SCALE, WIDTH, BINS):
            continue
        for kind in KINDS:
            histogram = _histogram(entry.get(kind))
            if histogram is not None:
                histograms[kind][step] = histogram
    return {kind: dict(sorted(by_step.items())) for kind, by_step in histograms.items()}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none where it is not there, and no line that is cut off."""
    if not path.is_file():
        return []
    entries = []
    # Not splitlines: an answer may hold U+2028 or U+0085, which JSON leaves as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = parse_json(line)
        except ValueError:  # a run killed while it wrote
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _histogram(saved: Any) -> Histogram | None:
    if not isinstance(saved, dict):
        return None
    first, counts = saved.get("first"), saved.get("counts")
    if not isinstance(first, int) or not isinstance(counts, list) or not counts:
        return None
    if first < 0 or first + len(counts) > BINS:
        return None
    if not all(isinstance(count, int) and count >= 0 for count in counts) or not sum(counts):
        return None
    return Histogram([0] * first + counts + [0] * (BINS - first - len(counts)))


SAMPLES_FILE = "samples.jsonl"
