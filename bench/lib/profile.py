"""Peak memory and matrix products of a piece of work, as torch's profiler saw them.

Exact and repeatable; on a CPU it does not see buffers that a library such as oneDNN allocates
itself, nor products inside Triton kernels and libraries.
"""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it begins and ends
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""torch's matrix products, by where their first factor stands."""


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
    events = list(cast(Any, profiled).profiler.kineto_results.experimental_event_tree())
    for event in events:  # which grows by the children
        events += event.children
    return events


def operations(events: Iterable[Any]) -> int:
    """Of the matrix products: a multiplication and an addition for each term of a sum."""
    count = 0
    for event in events:
        name = event.name.removeprefix("aten::").rstrip("_")
        # Under torch.func an operation is there once for each level, below itself.
        if name in PRODUCTS and (event.parent is None or event.parent.name != event.name):
            shapes = [part.sizes for part in event.extra_fields.inputs[PRODUCTS[name] :][:2]]
            count += 2 * math.prod(shapes[0]) * shapes[1][-1]
    return count


def allocations(events: Iterable[Any], device: str) -> list[tuple[int, int]]:
    """(address, bytes) in order of time; a free has negative bytes."""
    memory = [(event, event.extra_fields) for event in events if event.name == "[memory]"]
    timed = [
        (event.start_time_ns, fields.ptr, fields.alloc_size)
        for event, fields in memory
        if fields.device.type == device
    ]
    if not timed:
        raise RuntimeError(f"the profiler saw no allocation on {device}")
    return [(pointer, size) for _, pointer, size in sorted(timed, key=lambda event: event[0])]


def status_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{field} is not in /proc/self/status")
