"""Data shown to people: on one line, and never able to steer a terminal."""

from __future__ import annotations


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
