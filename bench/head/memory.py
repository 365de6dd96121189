"""Peak memory of a provider's forward and backward beyond the inputs and the two gradients.

Two numbers, each with its blind spot:
- *allocator*: the most that torch's allocator had out at any moment, not counting the gradients
  that are returned (`bench.lib.profile`);
- *rss* (CPU): the peak of resident memory in a fresh process, less its level with the inputs and
  both gradients there: what a machine must have beyond those. Sees everything, with some tens of
  MiB for the profiler and the libraries; what is alive only before the gradients counts less.

The operations of all matrix products are counted in the same run.

`python -m bench.head.memory INPUTS PROVIDER` is the fresh process; it prints one line of JSON.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.head.providers import PROVIDERS, Provider
from bench.lib.peaked import PeakedCase
from bench.lib.profile import profiled_run, status_bytes
from bench.lib.workers import answer_of

MIB = 2**20
TIMEOUT_S = 300
Usage = dict[str, Any]
"""`peak_extra_mib`: kind to mebibytes. `operations`: of matrix products, None where not known."""


def usage_here(provider: Provider, case: PeakedCase) -> Usage:
    """Of this process, by the allocator alone; run it after a warm-up."""
    peak, operations = _profiled(provider, case)
    return _usage(operations, allocator=peak)


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
        allocator, operations = _profiled(provider, case)
    except (RuntimeError, AttributeError):
        allocator, operations = None, None
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - case.hidden.nbytes - case.weight.nbytes
    peak = max(0, peak)
    return _usage(operations, allocator=peak if allocator is None else allocator, cuda_peak=peak)


def cpu_usage(provider_name: str, inputs: Path) -> Usage:
    """From a fresh process that loads `inputs` (written by `torch.save`)."""
    return answer_of("bench.head.memory", str(inputs), provider_name, timeout_s=TIMEOUT_S)


def _cpu_usage(provider: Provider, case: PeakedCase) -> Usage:
    _profiled(provider, _small(case))
    gradients = [torch.zeros_like(case.hidden), torch.zeros_like(case.weight)]
    level = status_bytes("VmRSS")
    gradients.clear()
    allocator, operations = _profiled(provider, case)
    return _usage(operations, allocator=allocator, rss=max(0, status_bytes("VmHWM") - level))


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


def _usage(operations: int | None, **peaks: int) -> Usage:
    mebibytes = {name: round(size / MIB, 2) for name, size in peaks.items()}
    return {"peak_extra_mib": mebibytes, "operations": operations}


def main(inputs: str, provider_name: str) -> None:
    case = PeakedCase(**torch.load(inputs, weights_only=True))
    print(json.dumps(_cpu_usage(PROVIDERS[provider_name], case)))


if __name__ == "__main__":
    main(*sys.argv[1:])
