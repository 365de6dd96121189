"""Histograms as ridges, one below the other: by step of training, or by run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..monitor.margins import Histogram
from .charts import nice_ticks, tick_label
from .marks import WIDTH, Dot, Drawing, Key, Label, Path

MOST_RIDGES = 7
POINTS = 72
NAMED, LEFT, RIGHT, BOTTOM, GAP, PEAK = 70.0, 14.0, 46.0, 28.0, 34.0, 44.0


@dataclass(frozen=True)
class Kind:
    """A quantity that every pair has one value of."""

    title: str
    note: str
    remark: Callable[[Histogram], str]


KINDS = {
    "reward_margins": Kind(
        "Reward margins over pairs",
        "chosen minus rejected, each held-out pair, with the share above zero",
        lambda histogram: f"{histogram.share_above_zero():.0%}",
    ),
    "target_margins": Kind(
        "Target margins over pairs",
        "what the objective asks of each held-out pair, with the median",
        lambda histogram: f"{histogram.quantile(0.5):.2f}",
    ),
}
"""By the names that histograms have in a run's file."""


@dataclass(frozen=True)
class Ridge:
    """One histogram, with its name on one side and on the other a number worth reading."""

    label: str
    colour: str
    histogram: Histogram
    faint: bool = False


@dataclass(frozen=True)
class Shape:
    """Densities of all ridges over the same values, the highest of each 1."""

    low: float
    high: float
    ticks: list[float]
    heights: list[list[float]]  # POINTS each


def over_steps(by_step: Mapping[float, Histogram]) -> list[Ridge]:
    """A few evaluations from the first to the last, which stands out."""
    *earlier, last = [
        Ridge(f"step {step:g}", "accent", by_step[step], faint=True)
        for step in spread_out(list(by_step), MOST_RIDGES)
    ]
    return [*earlier, replace(last, faint=False)]


def spread_out(values: Sequence[float], count: int) -> list[float]:
    """At most ``count`` of the values, evenly, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def shape(ridges: Sequence[Ridge]) -> Shape:
    """Where the values of nearly all pairs lie, and how densely, each ridge to its peak."""
    lows = [ridge.histogram.quantile(0.01) for ridge in ridges]
    highs = [ridge.histogram.quantile(0.99) for ridge in ridges]
    ticks = nice_ticks(min([0.0, *lows]), max([0.0, *highs]), 5)
    low, high = min(ticks[0], 0.0), max(ticks[-1], 0.0)
    if not high > low:
        low, high = low - 0.5, high + 0.5
        ticks = [low, 0.0, high]
    step = (high - low) / POINTS
    heights = []
    for ridge in ridges:
        below = [ridge.histogram.below(low + i * step) for i in range(POINTS + 1)]
        density = np.diff(below)
        for _ in range(3):  # a bin may be wider or narrower than a point
            density = np.convolve(np.pad(density, 1, "edge"), [0.25, 0.5, 0.25], "valid")
        peak = density.max() or 1.0  # of this ridge: a common one would flatten wide ridges
        heights.append((density / peak).tolist())
    return Shape(low, high, ticks, heights)


def draw_ridges(kind: Kind, ridges: Sequence[Ridge], *, named: bool = True) -> Drawing:
    """Lay the ridges out, with what is worth knowing of each on its right.

    Args:
        named: whether the labels are on the left; else a legend has them.
    """
    shapes = shape(ridges)
    floor = 12 + PEAK + GAP * (len(ridges) - 1)
    height = floor + BOTTOM
    left, right = NAMED if named else LEFT, WIDTH - RIGHT

    def x(value: float) -> float:
        return left + (right - left) * (value - shapes.low) / (shapes.high - shapes.low)

    marks: list[Path | Dot | Label] = []
    for tick in shapes.ticks:
        look = ("gridline", "rule") if tick else ("reference", "soft")
        marks.append(Path(*look, [(x(tick), 8), (x(tick), floor)]))
        marks.append(Label(x(tick), height - 8, tick_label(tick, shapes.ticks), "middle"))
    step = (right - left) / POINTS
    for row, (ridge, heights) in enumerate(zip(ridges, shapes.heights, strict=True)):
        base = 12 + PEAK + GAP * row
        crest = [(left + (i + 0.5) * step, base - PEAK * each) for i, each in enumerate(heights)]
        outline = [(left, base), *crest, (right, base)]
        faint = "faint-" if ridge.faint else ""
        marks.append(Path(f"{faint}ridge", ridge.colour, outline))
        marks.append(Path(f"{faint}crest", ridge.colour, outline))
        if named:
            marks.append(Label(left - 8, base, ridge.label, "end"))
        marks.append(Label(WIDTH, base, kind.remark(ridge.histogram), "end"))
    keys = [] if named else [Key(ridge.label, ridge.colour) for ridge in ridges]
    return Drawing(kind.title, kind.note, kind.title, keys, height, marks)
