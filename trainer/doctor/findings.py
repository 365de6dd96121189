"""One line of `doctor`'s report, which every check yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"
GIB = 2**30


@dataclass
class Finding:
    """One line of the report: how it stands with something, and what to do about it."""

    status: str
    name: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n        -> {self.advice}" if self.advice else ""
        return f"  {self.status:<5} {self.name}: {self.detail}{advice}"


Findings = Iterator[Finding]


def cause(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
