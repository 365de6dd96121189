"""Histograms as ridges, one below the other: by step of training, or by run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from ..monitor.margins import Histogram
from .charts import nice_ticks, tick_label

MOST_RIDGES = 7
POINTS = 72
WIDTH, NAMED, LEFT, RIGHT, BOTTOM, GAP, PEAK = 400.0, 70.0, 14.0, 46.0, 28.0, 34.0, 44.0
REWARD_RIDGES = "chosen minus rejected, each held-out pair; beside it the share above zero"
TARGET_RIDGES = "what the objective asks of each held-out pair; beside it the median"


@dataclass(frozen=True)
class Ridge:
    """One histogram: what it is, and a number worth reading beside it."""

    label: str
    colour: str
    histogram: Histogram
    remark: str
    faint: bool = False


@dataclass(frozen=True)
class Ridges:
    title: str
    note: str
    ridges: list[Ridge]
    named: bool = True  # beside the ridges; else a legend says which is whose


@dataclass(frozen=True)
class Shape:
    """Densities of all ridges over the same values, the highest of each 1."""

    low: float
    high: float
    ticks: list[float]
    heights: list[list[float]]  # POINTS each


def over_steps(title: str, note: str, by_step: dict[float, Histogram], remark: str) -> Ridges:
    """A few evaluations from the first to the last, which stands out.

    Args:
        remark: "above zero", or "median", the number beside each.
    """
    ridges = [
        Ridge(f"step {step:g}", "accent", by_step[step], remark_on(by_step[step], remark), True)
        for step in spread_out(list(by_step), MOST_RIDGES)
    ]
    if ridges:
        last = ridges[-1]
        ridges[-1] = Ridge(last.label, last.colour, last.histogram, last.remark)
    return Ridges(title, note, ridges)


def remark_on(histogram: Histogram, remark: str) -> str:
    if remark == "median":
        return f"{histogram.quantile(0.5):.2f}"
    return f"{histogram.share_above_zero():.0%}"


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
        density = [b - a for a, b in pairwise(below)]
        for _ in range(3):  # a bin may be wider or narrower than a point
            padded = [density[0], *density, density[-1]]
            density = [
                (padded[i - 1] + 2 * padded[i] + padded[i + 1]) / 4 for i in range(1, POINTS + 1)
            ]
        peak = max(density) or 1.0  # each its own: a narrow one would flatten all others
        heights.append([value / peak for value in density])
    return Shape(low, high, ticks, heights)


def ridges_svg(chart: Ridges) -> str:
    """The chart as one `<svg>` element; the ridges' labels and remarks are in it."""
    found = shape(chart.ridges)
    floor = 12 + PEAK + GAP * (len(chart.ridges) - 1)
    height = floor + BOTTOM
    left, right = NAMED if chart.named else LEFT, WIDTH - RIGHT

    def x(value: float) -> float:
        return left + (right - left) * (value - found.low) / (found.high - found.low)

    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        f'aria-label="{escape(chart.title, quote=True)}">'
    ]
    for tick in found.ticks:
        kind = "reference" if tick == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{x(tick):.1f} 8V{floor:g}"/>')
        parts.append(_label(x(tick), height - 8, "middle", tick_label(tick, found.ticks)))
    step = (right - left) / POINTS
    for row, (ridge, heights) in enumerate(zip(chart.ridges, found.heights, strict=True)):
        base = 12 + PEAK + GAP * row
        places = [
            f"{left + (i + 0.5) * step:.1f} {base - PEAK * h:.1f}" for i, h in enumerate(heights)
        ]
        outline = f"M{left:g} {base:g}L{'L'.join(places)}L{right:g} {base:g}"
        faint = " faint" if ridge.faint else ""
        parts.append(f'<path class="ridge {ridge.colour}{faint}" d="{outline}Z"/>')
        parts.append(f'<path class="crest {ridge.colour}{faint}" d="{outline}"/>')
        if chart.named:
            parts.append(_label(left - 8, base, "end", ridge.label))
        parts.append(_label(WIDTH, base, "end", ridge.remark))
    return "".join([*parts, "</svg>"])


def _label(x: float, y: float, anchor: str, label: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
