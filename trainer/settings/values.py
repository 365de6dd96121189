"""Values that settings may take: whole numbers, numbers, one of a few names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import UserError


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number from ``least`` on; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def expect_whole(name: str, value: object, least: int) -> None:
    """Raise ``UserError`` unless ``value`` is a whole number from ``least`` on."""
    if not is_whole(value, least):
        raise UserError(f"{name}: expected a whole number from {least} on, got {value!r}")


def expect_one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ``UserError`` unless ``value`` is one of the ``known`` names."""
    if value not in known:
        raise UserError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
