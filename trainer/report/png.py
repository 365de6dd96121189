"""Drawings as one image, by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from .marks import DOT_RADIUS, LOOKS, PALETTE, TEXT_SIZE, WIDTH, Dot, Drawing, Key, Label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS, GAP, TITLE, DPI = 3, 36.0, 60.0, 110
"""Drawings in a row, space between them and above them. All lengths here are in points."""

HEAD, NOTE_LINE, KEY_LINE = 24.0, 15.0, 18.0
NOTE_LETTERS, KEY_LETTERS = 64, 28  # what fits across a drawing, and across half of one
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
ANCHORS = {"middle": "center", "end": "right"}


def write_png(title: str, drawings: Sequence[Drawing], out: FilePath) -> None:
    """Write the drawings below a title, three in a row, on the palette's light colours."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # which would read dollars as formulas
        _figure(title, drawings).savefig(str(out), dpi=DPI, format="png")


def _figure(title: str, drawings: Sequence[Drawing]) -> Figure:
    from matplotlib.figure import Figure

    rows = [drawings[i : i + ACROSS] for i in range(0, len(drawings), ACROSS)]
    head = max(map(_head, drawings), default=0.0)
    heights = [head + max(drawing.height for drawing in row) for row in rows]
    width = ACROSS * (WIDTH + GAP) + GAP
    height = bottom = TITLE + sum(row_height + GAP for row_height in heights)
    figure = Figure(figsize=(width / 72, height / 72), facecolor=COLOURS["card"])
    style = {"fontsize": 24, "fontweight": "bold", "color": COLOURS["ink"]}
    figure.text(GAP / width, 1 - 40 / height, title, **style)
    bottom -= TITLE
    for row, row_height in zip(rows, heights, strict=True):
        bottom -= row_height
        for column, drawing in enumerate(row):
            left = GAP + column * (WIDTH + GAP)
            box = (left / width, bottom / height, WIDTH / width, row_height / height)
            axes = figure.add_axes(box, xlim=(0, WIDTH), ylim=(row_height - head, -head))
            axes.set_axis_off()
            _write_head(axes, drawing, -head)
            _draw_marks(axes, drawing)
        bottom -= GAP
    return figure


def _head(drawing: Drawing) -> float:
    """The height of title, note and legend, above the marks."""
    return HEAD + NOTE_LINE * len(_note_lines(drawing)) + KEY_LINE * len(_key_rows(drawing))


def _note_lines(drawing: Drawing) -> list[str]:
    return textwrap.wrap(drawing.note, NOTE_LETTERS, max_lines=2, placeholder="…")


def _key_rows(drawing: Drawing) -> list[list[Key]]:
    letters = max((len(key.label + key.value) for key in drawing.keys), default=0)
    columns = 1 if letters > KEY_LETTERS else 2
    return [drawing.keys[i : i + columns] for i in range(0, len(drawing.keys), columns)]


def _write_head(axes: Axes, drawing: Drawing, top: float) -> None:
    soft, y = COLOURS["soft"], top + 12
    title = {"fontsize": 14, "fontweight": "bold", "color": COLOURS["ink"]}
    axes.text(0, y, drawing.title, **title)
    for line in _note_lines(drawing):
        y += NOTE_LINE
        axes.text(0, y, line, fontsize=11, color=soft)
    for row in _key_rows(drawing):
        y += KEY_LINE
        for column, key in enumerate(row):
            x, colour = column * WIDTH / 2, COLOURS[key.colour]
            if key.dots:
                axes.plot(x + 7, y - 4, "o", color=colour, markersize=2 * DOT_RADIUS)
            else:
                axes.plot([x, x + 14], [y - 4, y - 4], color=colour, linewidth=3)
            axes.text(x + 20, y, f"{key.label} {key.value}", fontsize=11, color=soft)


def _draw_marks(axes: Axes, drawing: Drawing) -> None:
    for order, mark in enumerate(drawing.marks):
        if isinstance(mark, Label):
            style = {"ha": ANCHORS[mark.anchor], "fontsize": TEXT_SIZE, "color": COLOURS["soft"]}
            axes.text(mark.x, mark.y, mark.text, zorder=order, **style)
            continue
        common = {"color": COLOURS[mark.colour], "zorder": order, "clip_on": False}
        if isinstance(mark, Dot):
            edge = {"markeredgecolor": COLOURS["card"], "markeredgewidth": 1.2}
            axes.plot(mark.x, mark.y, "o", markersize=2 * DOT_RADIUS, **edge, **common)
            continue
        look, (xs, ys) = LOOKS[mark.kind], zip(*mark.places, strict=True)
        if look.width:
            dashes = (0, look.dashes) if look.dashes else "solid"
            stroke = {"linewidth": look.width, "alpha": look.opacity, "linestyle": dashes}
            axes.plot(xs, ys, **stroke, **common)
        else:
            axes.fill(xs, ys, alpha=look.opacity, linewidth=0, **common)
