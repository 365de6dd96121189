"""Text shown to people: it steers no terminal, ends no run that shows it, and hides paths."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def printable(text: str, limit: int | None = None) -> str:
    """``text`` with whatever is not printable escaped, shortened to about ``limit`` characters.

    Newlines, terminal escapes, direction overrides and lone surrogates become ``\\n``, ``\\x1b``,
    ``\\u202e``, ...
    """
    if limit is not None and len(text) > limit:
        text = text[:limit] + "…"
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def visible(text: str) -> str:
    """As `printable`, with newlines, tabs and all kinds of spaces as they are."""
    kept = "\n\t"
    return "".join(
        c if c.isprintable() or c in kept or unicodedata.category(c) == "Zs" else _escaped(c)
        for c in text
    )


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


class _Steady:
    """A text stream whose failures to write are passed over."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            plain = text.encode(encoding, "backslashreplace").decode(encoding)
            with suppress(OSError, ValueError):
                self._stream.write(plain)
        except (OSError, ValueError):  # the latter from a closed stream
            pass
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def steady_console() -> Iterator[None]:
    """Inside, what goes to the terminal cannot raise; nor what is left of it when Python ends.

    A line that cannot be written (the pipe's reader has gone, the log's disk is full) is lost, and
    a character that the encoding lacks is escaped.
    """
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, _Steady):
        yield
        return
    sys.stdout, sys.stderr = (None if s is None else _Steady(s) for s in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, before):
            _settle(stream)


def _settle(stream: Any) -> None:
    """Let what cannot be written go, or Python's last flush makes the exit status 120."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def colours() -> bool:
    """Whether standard output is a terminal that wants colours (see no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def unplaced(value: Any) -> Any:
    """Names and settings in which a path of this machine is cut to its last component.

    Readers elsewhere learn nothing from the rest of a path but who trained where.
    """
    if isinstance(value, Mapping):
        return {unplaced(key): unplaced(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [unplaced(part) for part in value]
    return Path(value).name or "folder" if isinstance(value, str) and is_place(value) else value


def is_place(name: str) -> bool:
    """Whether a name is a path of this machine, by its form or because the path exists."""
    if name.startswith(("/", "~", "./", "../")):
        return True
    try:
        return "/" in name and Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or no text for one
        return False
