"""The charts of a report as one image, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..monitor.history import Run
from .charts import Chart, run_charts
from .compare import comparison_charts, comparison_headline, comparison_ridges
from .groups import group_runs
from .ridges import POINTS, Ridges, shape

_GROUPS = ("2563c9", "c8622a", "12836b", "9a3fb5", "a87b00", "c2335d", "0f8aa8", "6b7280")
COLOURS = {"accent": "#2563c9", "muted": "#a3a8b3", "chosen": "#12836b", "rejected": "#c8622a"}
COLOURS |= {f"c{i}": f"#{colour}" for i, colour in enumerate(_GROUPS)}
ACROSS, WIDTH, HEIGHT, DPI = 3, 4.6, 3.1, 150
INK, SOFT, RULE, PAPER = "#1d1f23", "#666b75", "#e4e2dd", "#ffffff"


def write_png(runs: Sequence[Run], out: Path) -> None:
    """Every chart of the runs, three in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if len(runs) > 1:
        groups = group_runs(runs)
        title = comparison_headline(groups)
        charts: list[Chart | Ridges] = [*comparison_charts(groups), *comparison_ridges(groups)]
    else:
        from .write import headline, run_ridges

        title, charts = headline(runs[0]), [*run_charts(runs[0]), *run_ridges(runs[0])]
    rows = max(1, math.ceil(len(charts) / ACROSS))
    figure = Figure(figsize=(WIDTH * ACROSS, HEIGHT * rows + 0.6), facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.suptitle(_safe(title), x=0.012, ha="left", fontsize=17, fontweight="bold", color=INK)
    for place, chart in enumerate(charts):
        axes = figure.add_subplot(rows, ACROSS, place + 1)
        _dress(axes, chart)
        if isinstance(chart, Ridges):
            _draw_ridges(axes, chart)
        else:
            _draw(axes, chart)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / (HEIGHT * rows + 0.6)))
    figure.savefig(str(out), dpi=DPI, format="png")


def _dress(axes: Any, chart: Chart | Ridges) -> None:
    axes.set_title(
        _safe(chart.title), loc="left", fontsize=11, fontweight="bold", color=INK, pad=20
    )
    note = chart.note if len(chart.note) <= 76 else chart.note[:75] + "…"
    axes.text(0, 1.035, _safe(note), transform=axes.transAxes, fontsize=7.5, color=SOFT)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
    axes.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw(axes: Any, chart: Chart) -> None:
    for line in chart.lines:
        colour = COLOURS[line.colour]
        steps, values = [s for s, _ in line.points], [v for _, v in line.points]
        if line.low and line.high:
            low, high = [v for _, v in line.low], [v for _, v in line.high]
            axes.fill_between([s for s, _ in line.low], low, high, color=colour, alpha=0.16, lw=0)
        dots = "" if line.style == "line" and len(values) > 1 else "o"
        stroke = "" if line.style == "dots" else "-"
        look = {"linestyle": stroke, "linewidth": 1.6, "marker": dots, "markersize": 3.5}
        axes.plot(steps, values, color=colour, label=_safe(line.label), **look)
    if chart.reference is not None:
        axes.axhline(chart.reference, color=SOFT, linewidth=0.8, linestyle=(0, (3, 3)))
    if chart.low is not None or chart.high is not None:
        axes.set_ylim(bottom=chart.low, top=chart.high)
    axes.set_xlabel("step", fontsize=8, color=SOFT, loc="left")
    if len(chart.lines) > 1:
        axes.legend(fontsize=7.5, frameon=False, labelcolor=SOFT)


def _draw_ridges(axes: Any, chart: Ridges) -> None:
    found = shape(chart.ridges)
    step = (found.high - found.low) / POINTS
    places = [found.low + (i + 0.5) * step for i in range(POINTS)]
    for row, (ridge, heights) in enumerate(zip(chart.ridges, found.heights, strict=True)):
        base, colour = -0.75 * row, COLOURS[ridge.colour]
        tops = [base + height for height in heights]
        alpha = 0.1 if ridge.faint else 0.32
        axes.fill_between(places, base, tops, color=colour, alpha=alpha, lw=0)
        axes.plot(places, tops, color=colour, linewidth=1.4, alpha=0.6 if ridge.faint else 1.0)
        beside = {"fontsize": 7.5, "va": "bottom", "color": INK}
        across = axes.get_yaxis_transform()
        axes.text(1.01, base, _safe(ridge.remark), transform=across, **beside)
    axes.axvline(0, color=SOFT, linewidth=0.8, linestyle=(0, (3, 3)))
    bases = [-0.75 * row for row in range(len(chart.ridges))]
    axes.set_yticks(bases, [_safe(ridge.label) for ridge in chart.ridges])
    axes.grid(axis="y", visible=False)


def _safe(label: str) -> str:
    """Text as it is: matplotlib would read dollars as formulas."""
    return label.replace("$", r"\$")
