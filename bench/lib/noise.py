"""Whether a run was quiet enough to publish: other programs' load, and spread of step times.

A noisy run says more about the machine than about the code, so `bench/results` takes none unless
``--keep-noisy`` asks for it. Its rows go to `outputs/noisy/` instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import psutil

from bench.lib.record import RESULTS, ROOT

MAX_SPREAD = 0.25
"""Of the largest difference between a step's two fastest times, as a share of the fastest."""
MAX_OTHERS = 0.15
"""Of the machine's cores, that other programs may use on average while the benchmark runs."""
NOISY = ROOT / "outputs" / "noisy"


class Load:
    """Cores that programs other than this one and its children have used since it was made."""

    def __init__(self) -> None:
        self._busy, self._idle = _machine()
        self._own = _own()

    def others(self) -> float:
        """As a share of all cores. A hypervisor's stolen time counts as another program's."""
        busy, idle = _machine()
        passed = busy - self._busy + idle - self._idle
        others = busy - self._busy - (_own() - self._own)
        return max(0.0, others / passed) if passed > 0 else 0.0


def _machine() -> tuple[float, float]:
    """Seconds of all cores in use and idle. Linux counts guests' time within the users'."""
    times = psutil.cpu_times()._asdict()
    idle = times.pop("idle") + times.pop("iowait", 0.0)
    return sum(value for name, value in times.items() if not name.startswith("guest")), idle


def _own() -> float:
    """Seconds of this process and all its children, also of those that have ended."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-noisy", action="store_true", help="store a noisy run in bench/results too"
    )


def noises(others: float, spreads: dict[str, float]) -> list[str]:
    """Each thing that makes a run noisy, with its number; none of a quiet run."""
    found = []
    if others > MAX_OTHERS:
        cores = os.cpu_count() or 1
        found.append(f"other programs used {others * cores:.1f} of {cores} cores")
    found += [
        f"{name}'s steps spread by {spread:.0%}"
        for name, spread in spreads.items()
        if spread > MAX_SPREAD
    ]
    return found


def place_for(out: Path, found: list[str], keep_noisy: bool) -> Path:
    """Where the rows go: ``out``, or a file under `outputs/noisy` if noise keeps them out."""
    if not found or keep_noisy or not out.resolve().is_relative_to(RESULTS):
        return out
    print(
        "error: repeat it when the machine is idle, or pass --keep-noisy; this run is too noisy "
        f"for bench/results: {'; '.join(found)}. Its rows are in {NOISY / out.name}",
        file=sys.stderr,
    )
    return NOISY / out.name
