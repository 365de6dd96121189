"""Line charts over the steps of training: their description, and its layout into marks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ..monitor.history import Point, thin
from ..text import figure
from .marks import WIDTH, Dot, Drawing, Key, Label, Path, Place

ACCURACY = "share of pairs where chosen earns more than rejected"
MARGIN = "reward of chosen minus reward of rejected"
Style = Literal["line", "dotted", "dots"]  # a line, a line with a dot each value, dots alone

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 210.0, 48.0, 14.0, 10.0, 28.0


@dataclass(frozen=True)
class Line:
    """One metric of a chart."""

    label: str
    colour: str  # "accent", "muted", "chosen", "rejected", or "c0" to "c7" of the runs compared
    points: list[Point]
    style: Style = "line"
    low: list[Point] | None = None  # ends of a band around the line, at the steps of ``points``
    high: list[Point] | None = None


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    lines: list[Line] = field(default_factory=list)
    low: float | None = None  # fixed ends of the y axis; None follows the values
    high: float | None = None
    reference: float | None = None  # a dashed line across


@dataclass(frozen=True)
class _Frame:
    """Maps steps and values to the drawing box."""

    last_step: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / (self.last_step or 1.0)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(share, 0.0), 1.0)


def filled(charts: list[Chart]) -> list[Chart]:
    """The charts and lines that have something to draw."""
    kept = []
    for chart in charts:
        lines = [ln for ln in chart.lines if any(math.isfinite(v) for _, v in ln.points)]
        if len(lines) == 1 and lines[0].colour == "muted":
            lines = [replace(lines[0], colour="accent")]
        if lines:
            kept.append(replace(chart, lines=lines))
    return kept


def draw_chart(chart: Chart, last_step: float) -> Drawing:
    """Lay the chart out over the steps from 0 to `last_step`."""
    frame, ticks = _frame(chart, last_step)

    def across(kind: str, colour: str, value: float) -> Path:
        y = frame.y(value)
        return Path(kind, colour, [(LEFT, y), (WIDTH - RIGHT, y)])

    marks: list[Path | Dot | Label] = []
    for tick in ticks:
        marks.append(across("gridline", "rule", tick))
        marks.append(Label(LEFT - 7, frame.y(tick) + 4, tick_label(tick, ticks), "end"))
    marks.append(Label(LEFT - 11, HEIGHT - 8, "step", "end"))
    marks += [
        Label(frame.x(step), HEIGHT - 8, f"{step:g}", "middle")
        for step in nice_ticks(0.0, last_step, 5)
        if step <= last_step
    ]
    if chart.reference is not None:
        marks.append(across("reference", "soft", chart.reference))
    for line in chart.lines:
        marks += [*_band(line, frame), *_line(line, frame)]
    keys = [
        Key(line.label, line.colour, line.style == "dots", figure(_last_finite(line.points)))
        for line in chart.lines
    ]
    seen = f"{chart.title} over training steps"
    return Drawing(chart.title, chart.note, seen, keys, HEIGHT, marks)


def _last_finite(points: list[Point]) -> float:
    return next(value for _, value in reversed(points) if math.isfinite(value))


def _frame(chart: Chart, last_step: float) -> tuple[_Frame, list[float]]:
    """Axis ends on round numbers that hold every value and band, and the ticks between them."""
    series = [s for line in chart.lines for s in (line.points, line.low or [], line.high or [])]
    values = [v for points in series for _, v in thin(points) if math.isfinite(v)]
    low = min(values, default=0.0) if chart.low is None else chart.low
    high = max(values, default=1.0) if chart.high is None else chart.high
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    if not math.isfinite(high - low):
        low, high = max(low, -1e300), min(high, 1e300)
    ticks = nice_ticks(low, high, 4)
    low = low if chart.low is not None else ticks[0]
    high = high if chart.high is not None else ticks[-1]
    return _Frame(last_step, low, high), [t for t in ticks if low <= t <= high]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` + 1 round numbers that reach from at most `low` to at least `high`."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    size = 10.0 ** math.floor(math.log10(span / count))
    step = next((m * size for m in (1, 2, 2.5, 5) if span / (m * size) <= count), 10 * size)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def tick_label(value: float, ticks: list[float]) -> str:
    """A tick with as many decimals as its neighbours need."""
    largest = max(abs(t) for t in ticks)
    if largest >= 1e4 or (0 < largest < 1e-3):
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-") if value else "0"
    step = abs(ticks[1] - ticks[0]) if len(ticks) > 1 else 1.0
    decimals = next((d for d in range(5) if abs(round(step, d) - step) < 1e-9), 5)
    return f"{value:.{decimals}f}"


def _band(line: Line, frame: _Frame) -> list[Path]:
    if not (line.low and line.high):
        return []
    lows, highs = dict(thin(line.low)), dict(thin(line.high))
    paths = []
    for stretch in _unbroken([(step, lows[step] + highs[step]) for step in lows]):
        upper = [(frame.x(step), frame.y(highs[step])) for step, _ in stretch]
        lower = [(frame.x(step), frame.y(lows[step])) for step, _ in stretch]
        paths.append(Path("band", line.colour, upper + lower[::-1]))
    return paths


def _line(line: Line, frame: _Frame) -> list[Path | Dot]:
    marks: list[Path | Dot] = []
    for stretch in _unbroken(thin(line.points)):
        places: list[Place] = [(frame.x(step), frame.y(value)) for step, value in stretch]
        if len(places) > 1 and line.style != "dots":
            marks.append(Path("thin" if line.colour == "muted" else "line", line.colour, places))
        if line.style != "line" or len(places) == 1:
            marks += [
                Dot(line.colour, x, y, f"{line.label}, step {step:g}: {value:.4g}")
                for (x, y), (step, value) in zip(places, stretch, strict=True)
            ]
    return marks


def _unbroken(points: list[Point]) -> list[list[Point]]:
    """The stretches of points between values that are not finite."""
    stretches: list[list[Point]] = [[]]
    for step, value in points:
        if math.isfinite(value):
            stretches[-1].append((step, value))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]
