"""Line charts, as data and as inline SVG, whose colours are the page's CSS classes.

Coordinates are in a fixed 400 by 210 box that the page scales; text stays readable on a phone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

from ..monitor.history import SAMPLED_TOKENS, Point, Run, thin

ACCURACY = "share of pairs where chosen earns more than rejected"
MARGIN = "reward of chosen minus reward of rejected"
Style = Literal["line", "dotted", "dots"]  # a line, a line with a dot each value, dots alone

WIDTH, HEIGHT = 400.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 14.0, 10.0, 28.0


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
    lines: list[Line]
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


def run_charts(run: Run) -> list[Chart]:
    """The charts that a run's logs can fill, most telling first."""

    def both(key: str) -> list[Line]:
        return [
            Line("training", "muted", run.series(key)),
            Line("held-out", "accent", run.series("eval_" + key), "dotted"),
        ]

    def sides(key: str) -> list[Line]:
        lines = []
        for side in ("chosen", "rejected"):
            name = f"{key}/{side}"
            lines.append(Line(side, side, run.series(name)))
            lines.append(Line(f"{side}, held-out", side, run.series("eval_" + name), "dots"))
        return lines

    def training(key: str, label: str = "training") -> list[Line]:
        return [Line(label, "accent", run.series(key))]

    asked = "what the objective asks of a pair, mean ± standard deviation"
    charts = [
        Chart("Reward accuracy", ACCURACY, both("rewards/accuracies"), 0.0, 1.0, 0.5),
        Chart("Reward margin", MARGIN, both("rewards/margins")),
        Chart("Log-probabilities", mass_note(run), sides("logps")),
        Chart("Loss", "mean over pairs", both("loss")),
        Chart("Target margin", asked, [_with_std(run)]),
        Chart("Lengths of the pairs", "completion tokens per answer", sides("lengths"), low=0.0),
        Chart(
            "Lengths of its own answers",
            "tokens, mean over the sampled prompts",
            [Line("sampled", "accent", run.series(SAMPLED_TOKENS), "dotted")],
            low=0.0,
        ),
        Chart(
            "Throughput",
            "pairs per second in training",
            training("pairs_per_s", "pairs per second"),
            low=0.0,
        ),
        Chart("Gradient norm", "before clipping", training("grad_norm"), low=0.0),
        Chart("Learning rate", "", training("learning_rate"), low=0.0),
    ]
    filled = [without_empty(chart) for chart in charts]
    return [chart for chart in filled if chart.lines]


def mass_note(run: Run) -> str:
    """Where chosen and rejected log-probs went: margins may grow while both become unlikely."""
    note = "nats per token, mean over pairs"
    moves = []
    for side in ("chosen", "rejected"):
        values = [v for _, v in run.series(f"{run.prefix()}logps/{side}") if math.isfinite(v)]
        if len(values) < 2:
            return note
        moves.append(values[-1] - values[0])
    chosen, rejected = moves
    said = [
        f"{side} {'rose' if move > 0 else 'fell'} by {abs(move):.2g}"
        for side, move in (("chosen", chosen), ("rejected", rejected))
    ]
    verdict = ": probability leaves both answers" if chosen < -0.01 and rejected < 0 else ""
    return f"{note}; {', '.join(said)}{verdict}"


def _with_std(run: Run) -> Line:
    widths = dict(run.series("margin/std"))
    means = run.series("margin/mean")
    around = [(s, v, w if math.isfinite(w := widths.get(s, 0.0)) else 0.0) for s, v in means]
    low, high = [(s, v - w) for s, v, w in around], [(s, v + w) for s, v, w in around]
    return Line("mean ± std", "accent", means, low=low, high=high)


def without_empty(chart: Chart) -> Chart:
    """The chart with the lines that have something to draw."""
    lines = [ln for ln in chart.lines if any(math.isfinite(v) for _, v in ln.points)]
    if len(lines) == 1 and lines[0].colour == "muted":
        lines = [replace(lines[0], colour="accent")]
    return replace(chart, lines=lines)


def svg(chart: Chart, last_step: float) -> str:
    """The chart as one `<svg>` element over the steps from 0 to `last_step`."""
    frame, ticks = _frame(chart, last_step)
    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escape(chart.title, quote=True)} over training steps">'
    ]
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>')
        parts.append(_text(LEFT - 7, y + 4, tick_label(tick, ticks), "end"))
    parts.append(_text(LEFT - 11, HEIGHT - 8, "step", "end"))
    steps = [t for t in nice_ticks(0.0, last_step, 5) if t <= last_step]
    for step in steps:
        parts.append(_text(frame.x(step), HEIGHT - 8, f"{step:g}", "middle"))
    if chart.reference is not None:
        y = frame.y(chart.reference)
        parts.append(f'<path class="reference" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>')
    parts += [_line(line, frame) for line in chart.lines]
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


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


def _line(line: Line, frame: _Frame) -> str:
    parts = []
    if line.low and line.high:
        for ends in _unbroken_bands(thin(line.low), thin(line.high)):
            upper = [(frame.x(s), frame.y(high)) for s, _, high in ends]
            lower = [(frame.x(s), frame.y(low)) for s, low, _ in ends]
            outline = _path(upper + lower[::-1])
            parts.append(f'<path class="band {line.colour}" d="{outline}Z"/>')
    for run_of_points in _unbroken(thin(line.points)):
        places = [(frame.x(step), frame.y(value)) for step, value in run_of_points]
        if len(places) > 1 and line.style != "dots":
            parts.append(f'<path class="line {line.colour}" d="{_path(places)}"/>')
        if line.style != "line" or len(places) == 1:
            parts += [
                f'<circle class="{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(line.label)}, step {step:g}: {value:.4g}</title></circle>"
                for (x, y), (step, value) in zip(places, run_of_points, strict=True)
            ]
    return "".join(parts)


def _unbroken_bands(low: list[Point], high: list[Point]) -> list[list[tuple[float, float, float]]]:
    """The stretches of a band, as (step, low, high), between values that are not finite."""
    stretches = _unbroken([(s, lo + hi) for (s, lo), (_, hi) in zip(low, high, strict=True)])
    lows, highs = dict(low), dict(high)
    return [[(s, lows[s], highs[s]) for s, _ in stretch] for stretch in stretches]


def _unbroken(points: list[Point]) -> list[list[Point]]:
    """The stretches of points between values that are not finite."""
    stretches: list[list[Point]] = [[]]
    for step, value in points:
        if math.isfinite(value):
            stretches[-1].append((step, value))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
