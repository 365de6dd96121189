"""Timing with a cold cache, and what is known about the machine."""

import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


class ColdTimer:
    """Times calls on one device, in ms, after evicting the last-level cache."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
        else:
            cache = last_level_cache_bytes()
        self.evict_bytes = 2 * cache
        self._evict = torch.empty(self.evict_bytes, dtype=torch.uint8, device=device)
        # What exists now is left out of later collections: with peers loaded, one takes 0.1 s.
        gc.collect()
        gc.freeze()

    def evict(self) -> None:
        gc.collect()
        self._evict.add_(1)

    def time(self, function: Callable[[], Result]) -> tuple[Result, float]:
        return timed(function, self.cuda)


def timed(function: Callable[[], Result], cuda: bool) -> tuple[Result, float]:
    """The function's result and its time in ms: CUDA events around it, or wall time on a CPU."""
    if not cuda:
        start = time.perf_counter()
        result = function()
        return result, (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = function()
    end.record()
    torch.cuda.synchronize()
    return result, begin.elapsed_time(end)


def spread(times_ms: list[float]) -> dict[str, float]:
    """Median, extremes and interquartile range, rounded to a microsecond."""
    low, _, high = (
        statistics.quantiles(times_ms, n=4, method="inclusive")
        if len(times_ms) > 1
        else (times_ms[0],) * 3
    )
    values = {
        "median": statistics.median(times_ms),
        "min": min(times_ms),
        "max": max(times_ms),
        "iqr": high - low,
    }
    return {name: round(value, 3) for name, value in values.items()}


def last_level_cache_bytes(default: int = 64 * 2**20) -> int:
    """Size of the largest cache of the first core, or `default` where Linux does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()):
            sizes.append(int(match[1]) * units[match[2]])
    return max(sizes) or default


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} logical cores"
