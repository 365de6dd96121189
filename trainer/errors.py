"""Errors that speak to the user, and checks of single values that raise them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Bad input: one line that names the thing, what was expected, what came and what to do.

    The command line prints it as ``error: ...`` and exits with code 2.
    """


@contextmanager
def refusals(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """What a library raises of these kinds inside becomes a ``UserError`` about ``what``."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{what}: {kind}{' '.join(str(error).split())[:400]}") from error


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number from ``least`` on; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1023


def expect(name: str, value: object, fits: bool, expected: str) -> None:
    """Raise ``UserError`` unless ``value`` fits; ``expected`` says in words which values do."""
    if not fits:
        raise UserError(f"{name}: expected {expected}, got {value!r}")


def expect_whole(name: str, value: object, least: int) -> None:
    """Raise ``UserError`` unless ``value`` is a whole number from ``least`` on."""
    expect(name, value, is_whole(value, least), f"a whole number from {least} on")


def expect_number(
    name: str,
    value: Any,
    expected: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raise ``UserError`` unless ``value`` is a finite number within these limits."""
    fits = is_number(value) and least <= value <= most and above < value < below
    expect(name, value, fits, expected)


def expect_bool(name: str, value: object) -> None:
    """Raise ``UserError`` unless ``value`` is true or false."""
    expect(name, value, isinstance(value, bool), "true or false")


def expect_one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ``UserError`` unless ``value`` is one of the ``known`` names."""
    expect(name, value, value in known, f"one of {', '.join(known)}")
