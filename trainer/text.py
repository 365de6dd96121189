"""Data shown to people: on one line, and never able to steer a terminal."""

from __future__ import annotations

import os
import sys


def printable(text: str, limit: int | None = None) -> str:
    """``text`` with whatever is not printable escaped, shortened to about ``limit`` characters.

    Newlines, terminal escapes, direction overrides and lone surrogates become ``\\n``, ``\\x1b``,
    ``\\u202e``, ...
    """
    if limit is not None and len(text) > limit:
        text = text[:limit] + "…"
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 8.4 s, 150 s, 12 min, 3 h 20 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 179.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def figure(value: float) -> str:
    """A number with the digits a reader wants: 0.968, -4.70, 22.7, 1250, 0.0025, 3e-06."""
    size = abs(value)
    if value == int(value) and size < 1e9:
        return f"{value:.0f}"
    if size >= 1e6 or size < 0.1:
        return f"{value:.3g}"
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:.{decimals}f}"


def colours() -> bool:
    """Whether standard output is a terminal that wants colours (see no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain
