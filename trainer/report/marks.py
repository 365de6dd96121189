"""Charts as marks in a box of 400 units across, and how each kind of mark looks.

A chart is laid out once, into a `Drawing`. `page` writes it as SVG and `png` draws it by
matplotlib, both from the palette and the looks below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = tuple[float, float]
"""x to the right and y downwards, from the upper left corner of the box."""

WIDTH = 400.0

PALETTE = {
    "paper": ("#fbfaf8", "#131519"),
    "card": ("#ffffff", "#1a1d22"),
    "ink": ("#1d1f23", "#e8e8ea"),
    "soft": ("#666b75", "#9a9fab"),
    "rule": ("#e4e2dd", "#2c3038"),
    "accent": ("#2563c9", "#79a9ff"),
    "muted": ("#a3a8b3", "#666c79"),
    "chosen": ("#12836b", "#4fc7a6"),
    "rejected": ("#c8622a", "#f09a63"),
    "c0": ("#2563c9", "#79a9ff"),
    "c1": ("#c8622a", "#f09a63"),
    "c2": ("#12836b", "#4fc7a6"),
    "c3": ("#9a3fb5", "#d490e8"),
    "c4": ("#a87b00", "#dcb64a"),
    "c5": ("#c2335d", "#f47c9c"),
    "c6": ("#0f8aa8", "#5cc6df"),
    "c7": ("#6b7280", "#a6acb8"),
}
"""Colours on a light and on a dark page; c0 to c7 are those of compared runs."""


@dataclass(frozen=True)
class Look:
    """A stroke of this width, or an area that is filled where the width is 0."""

    width: float = 0.0
    opacity: float = 1.0
    dashes: tuple[float, float] | None = None


LOOKS = {
    "gridline": Look(1.0),
    "reference": Look(1.0, dashes=(3.0, 4.0)),
    "line": Look(2.0),
    "thin": Look(1.4),
    "band": Look(opacity=0.16),
    "ridge": Look(opacity=0.32),
    "crest": Look(1.8),
    "faint-ridge": Look(opacity=0.1),
    "faint-crest": Look(1.2, opacity=0.6),
}
"""By kind of path."""

DOT_RADIUS, TEXT_SIZE = 3.0, 12.5


@dataclass(frozen=True)
class Path:
    kind: str  # of LOOKS
    colour: str  # of PALETTE
    places: list[Place]


@dataclass(frozen=True)
class Dot:
    colour: str
    x: float
    y: float
    title: str  # shown where a pointer rests on the dot


@dataclass(frozen=True)
class Label:
    x: float
    y: float  # of the base line
    text: str
    anchor: Literal["middle", "end"]


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    label: str
    colour: str
    dots: bool = False  # the line is drawn as dots alone
    value: str = ""  # the last one


@dataclass(frozen=True)
class Drawing:
    title: str
    note: str
    description: str  # for who cannot see the marks
    keys: list[Key]
    height: float
    marks: list[Path | Dot | Label]
