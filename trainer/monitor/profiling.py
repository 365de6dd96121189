"""A trace of a few training steps, and the operations they spend their time on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

WARM_UP = 3
"""Steps before the trace: compilation, caches and the first allocations are over by then."""

TRACED = 3
"""Steps in the trace."""

ROWS = 12
FILE = "trace.json.gz"


class ProfileCallback(TrainerCallback):
    """Traces steps 4 to 6 of a run (the last ones of a shorter one) on the main process.

    The trace goes to ``output_dir/trace.json.gz``, for chrome://tracing or ui.perfetto.dev, and a
    table of the operations that take longest is printed. The steps under trace are slower.
    """

    def __init__(self) -> None:
        self._first = self._last = 0
        self._profiler: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        traced = min(TRACED, left)
        self._first = state.global_step + min(WARM_UP, left - traced)
        self._last = self._first + traced

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step == self._first < self._last:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._last:
            self._finish(args.output_dir)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._finish(args.output_dir)

    def _finish(self, folder: str) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop()
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        print("\n".join([*table(profiler), f"trace: {path}"]), flush=True)


def table(profiler: Any) -> list[str]:
    """The operations with the most self time, on the GPU where there is one."""
    events = profiler.key_averages()
    on_device = any(event.self_device_time_total for event in events)

    def own_us(event: Any) -> float:
        return event.self_device_time_total if on_device else event.self_cpu_time_total

    total = sum(own_us(event) for event in events) or 1.0
    where = "GPU" if on_device else "CPU"
    lines = [f"{'ms on ' + where:>10} {'share':>6} {'calls':>8}  operation"]
    for event in sorted(events, key=own_us, reverse=True)[:ROWS]:
        share = own_us(event) / total
        lines.append(f"{own_us(event) / 1e3:10.1f} {share:6.1%} {event.count:8d}  {event.key[:70]}")
    return lines
