"""Peak memory of a forward and backward beyond the inputs and the two gradients; its products.

Two numbers of memory, each with its blind spot:
- *allocator*: the most that torch's allocator had out at any moment, not counting the gradients
  that are returned. Exact and repeatable; on a CPU it does not see buffers that a library such as
  oneDNN allocates itself.
- *rss* (CPU): the peak of resident memory in a fresh process, less its level with the inputs and
  both gradients there: what a machine must have beyond those. Sees everything, with some tens of
  MiB for the profiler and the libraries; what is alive only before the gradients counts less.

The same profile counts the operations of all matrix products that torch was asked for; those inside
Triton kernels and libraries it does not see.

`python -m bench.lib.memory INPUTS PROVIDER` is the fresh process; it prints one line of JSON.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bench.head.providers import PROVIDERS, Provider
from bench.lib.peaked import PeakedCase
from bench.lib.record import ROOT

MIB = 2**20
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it begins and ends
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""torch's matrix products, by where their first factor stands."""
Usage = dict[str, Any]
"""`peak_extra_mib`: kind to mebibytes. `operations`: of matrix products, None where not known."""


def usage_here(provider: Provider, case: PeakedCase) -> Usage:
    """Of this process, by the allocator alone; run it after a warm-up."""
    peak, operations = _profiled(provider, case)
    return {"peak_extra_mib": _mebibytes({"allocator": peak}), "operations": operations}


def cuda_usage(provider: Provider, case: PeakedCase) -> Usage:
    """Of this process; run it after a warm-up.

    The allocator's own counter of the peak includes the gradients once they exist, which is
    subtracted here: what was alive only before them counts less. It stands in where the profiler
    does not see the allocations.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        found, operations = _profiled(provider, case)
    except (RuntimeError, AttributeError):
        found, operations = None, None
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - case.hidden.nbytes - case.weight.nbytes
    peak = max(0, peak)
    peaks = {"allocator": peak if found is None else found, "cuda_peak": peak}
    return {"peak_extra_mib": _mebibytes(peaks), "operations": operations}


def cpu_usage(provider_name: str, inputs: Path, timeout_s: float = 300) -> Usage:
    """From a fresh process that loads `inputs` (written by `torch.save`)."""
    command = [sys.executable, "-m", "bench.lib.memory", str(inputs), provider_name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"exit status {done.returncode}: {' '.join(last)}")
    return json.loads(done.stdout.splitlines()[-1])


def _cpu_usage(provider: Provider, case: PeakedCase) -> Usage:
    _profiled(provider, _small(case))
    gradients = [torch.zeros_like(case.hidden), torch.zeros_like(case.weight)]
    level = status_bytes("VmRSS")
    gradients.clear()
    allocator, operations = _profiled(provider, case)
    peaks = {"allocator": allocator, "rss": max(0, status_bytes("VmHWM") - level)}
    return {"peak_extra_mib": _mebibytes(peaks), "operations": operations}


def _small(case: PeakedCase, tokens: int = 16, vocab: int = 512) -> PeakedCase:
    """A piece of the case, to load libraries with before anything is measured."""
    return replace(
        case,
        hidden=case.hidden[:tokens],
        weight=case.weight[:vocab],
        targets=case.targets[:tokens] % vocab,
        coefficients=case.coefficients[:tokens],
    )


def _profiled(provider: Provider, case: PeakedCase) -> tuple[int, int]:
    """Bytes at the highest point, the returned gradients apart, and operations."""

    def run() -> Iterable[Tensor]:
        return provider.run(case.hidden, case.weight, case.targets, case.coefficients)[1:]

    return profiled_run(run, case.hidden.device.type)


def profiled_run(run: Callable[[], Iterable[Tensor]], device: str) -> tuple[int, int]:
    """Bytes at the highest point of allocations minus frees, those of the tensors that ``run``
    returns apart; and the operations of all matrix products."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, record_shapes=True
    ) as profiled:
        gradients = list(run())
    kept = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    events = recorded_events(profiled)
    sizes = allocations(events, device)
    # A gradient's address may have been in use before: its allocation is the last one there.
    last = {pointer: i for i, (pointer, size) in enumerate(sizes) if size > 0}
    level = peak = 0
    for i, (pointer, size) in enumerate(sizes):
        if pointer not in kept or i < last[pointer]:
            level += size
            peak = max(peak, level)
    return peak, operations(events)


def recorded_events(profiled: torch.profiler.profile) -> list[Any]:
    """All of them: `profiled.events()` takes ten times as long to make, and has no allocations."""
    # The tree of events has no public accessor.
    found = list(cast(Any, profiled).profiler.kineto_results.experimental_event_tree())
    for event in found:  # which grows by the children
        found += event.children
    return found


def operations(events: Iterable[Any]) -> int:
    """Of the matrix products: a multiplication and an addition for each term of a sum."""
    found = 0
    for event in events:
        name = event.name.removeprefix("aten::").rstrip("_")
        # Under torch.func an operation is there once for each level, below itself.
        if name in PRODUCTS and (event.parent is None or event.parent.name != event.name):
            shapes = [part.sizes for part in event.extra_fields.inputs[PRODUCTS[name] :][:2]]
            found += 2 * math.prod(shapes[0]) * shapes[1][-1]
    return found


def allocations(events: Iterable[Any], device: str) -> list[tuple[int, int]]:
    """(address, bytes) in order of time; a free has negative bytes."""
    memory = [(event, event.extra_fields) for event in events if event.name == "[memory]"]
    found = [
        (event.start_time_ns, fields.ptr, fields.alloc_size)
        for event, fields in memory
        if fields.device.type == device
    ]
    if not found:
        raise RuntimeError(f"the profiler saw no allocation on {device}")
    return [(pointer, size) for _, pointer, size in sorted(found, key=lambda event: event[0])]


def _mebibytes(sizes: dict[str, int]) -> dict[str, float]:
    return {name: round(size / MIB, 2) for name, size in sizes.items()}


def status_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in /proc/self/status")


def main(inputs: str, provider_name: str) -> None:
    case = PeakedCase(**torch.load(inputs, weights_only=True))
    print(json.dumps(_cpu_usage(PROVIDERS[provider_name], case)))


if __name__ == "__main__":
    main(*sys.argv[1:])
