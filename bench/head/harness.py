"""Measure providers on one case: correctness gate, interleaved cold timings, peak memory, rows.

A row is a dict for JSON; bench/README.md says what its keys mean. Tables are made from rows and
from nothing else (`bench.lib.table`).
"""

import dataclasses
import math
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from widemargin.kernels.linear_logprob.routing import BLOCK

from bench.head.memory import cpu_usage, cuda_usage, usage_here
from bench.head.providers import BASELINE, Provider
from bench.lib.cases import Case
from bench.lib.exact import Exact, exact, relative_error
from bench.lib.peaked import PeakedCase, fp32_logps
from bench.lib.record import Commit, Row, environment
from bench.lib.timing import ColdTimer, spread

MEMORY_PROCESSES = 2  # at a time: memory, unlike time, does not depend on the neighbours
STATS = ("active_fraction", "averaged_mass_mean", "averaged_mass_max", "dense")


@dataclasses.dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    repeats: int = 3
    warmup: int = 0  # rounds beyond the gate's run, which already loads and compiles everything
    budget_s: float = math.inf  # no further round begins past this, once there are two
    memory: Literal["fresh", "here", "none"] = "fresh"  # in fresh processes (on a CPU), or in this


def measure(
    case: Case, providers: Iterable[Provider], settings: Settings, commit: Commit
) -> list[Row]:
    """One row per provider, those that cannot run or fail the gate included, with the reason."""
    inputs = case.build(settings.device)
    reference = exact(inputs)
    shared = _shared_fields(case, inputs, settings, commit)
    # What rounding alone costs.
    rounded = fp32_logps(inputs.hidden, inputs.weight, inputs.targets)
    shared["fp32_logits_logp_error"] = relative_error(rounded, reference.logp)
    rows: dict[str, Row] = {}
    admitted: list[Provider] = []
    for provider in providers:
        row = rows[provider.name] = {**shared, "provider": provider.name}
        row |= gate(provider, case, inputs, reference, settings.device)
        if row["gate"] == "passed":
            admitted.append(provider)
    del reference
    product, timed = _timings(admitted, inputs, settings)
    for name, times in timed.items():
        rows[name] |= times
        rows[name]["product_ms"] = product
        rows[name]["products"] = round(times["total_ms"]["median"] / product["median"], 3)
    if settings.memory != "none":
        for name, memory in _memory(admitted, case, inputs, settings).items():
            rows[name] |= memory
    _count_passes(rows)
    _add_ratios(rows)
    return list(rows.values())


def gate(
    provider: Provider, case: Case, inputs: PeakedCase, reference: Exact, device: str
) -> dict[str, Any]:
    """Errors against fp64 and whether they are within the provider's bounds."""
    if reason := provider.unavailable(case, device):
        return {"gate": "not available", "reason": reason}
    try:
        answer = provider.run(inputs.hidden, inputs.weight, inputs.targets, inputs.coefficients)
        if provider.reference is not None:
            reference = provider.reference(inputs, reference)
    except Exception as error:  # a peer's failure of any kind is a result to list
        return {"gate": "failed to run", "reason": f"{type(error).__name__}: {error}"[:300]}
    names = ("logp", "dhidden", "dweight")
    references = (reference.logp, reference.dhidden, reference.dweight)
    pairs = zip(names, answer, references, strict=True)
    errors = {name: relative_error(a, b) for name, a, b in pairs}
    bounds = dict(zip(names, provider.bounds(case), strict=True))
    over = [f"{n} {errors[n]:.1e} > {bounds[n]:.0e}" for n in names if not errors[n] <= bounds[n]]
    row = {"gate": "wrong" if over else "passed", "errors": errors, "bounds": bounds}
    return row | ({"reason": "error beyond the bound: " + ", ".join(over)} if over else {})


def _timings(
    providers: list[Provider], inputs: PeakedCase, settings: Settings
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Providers take turns, in an order that rotates, each half after an eviction of the cache.

    Returns:
        times of one bare product hidden @ weight.T, which has a turn of its own; by provider.
    """
    timer = ColdTimer(settings.device)
    logits = inputs.hidden.new_empty(len(inputs.hidden), len(inputs.weight))
    product: list[float] = []
    hidden = inputs.hidden.requires_grad_()
    weight = inputs.weight.requires_grad_()
    times: dict[str, list[tuple[float, float]]] = {provider.name: [] for provider in providers}
    stats: dict[str, dict[str, Any]] = {}
    begin = time.monotonic()
    for turn in range(settings.warmup + settings.repeats):
        if turn >= settings.warmup + 2 and time.monotonic() - begin > settings.budget_s:
            break
        timer.evict()
        with torch.no_grad():
            _, product_ms = timer.time(lambda: torch.mm(hidden, weight.T, out=logits))
        if turn >= settings.warmup:
            product.append(product_ms)
        shift = turn % max(1, len(providers))
        for provider in providers[shift:] + providers[:shift]:
            timer.evict()
            (logp, head_stats), forward_ms = timer.time(
                lambda provider=provider: provider.forward(hidden, weight, inputs.targets)
            )
            timer.evict()
            _, backward_ms = timer.time(
                lambda provider=provider, logp=logp: provider.backward(
                    logp, hidden, weight, inputs.coefficients
                )
            )
            stats[provider.name] = _head_stats(head_stats)
            del logp
            if turn >= settings.warmup:
                times[provider.name].append((forward_ms, backward_ms))
    inputs.hidden.requires_grad_(False)
    inputs.weight.requires_grad_(False)
    return spread(product), {
        name: {
            "forward_ms": spread([forward for forward, _ in pairs]),
            "backward_ms": spread([back for _, back in pairs]),
            "total_ms": spread([forward + back for forward, back in pairs]),
            "repeats": len(pairs),
            "cold_cache_mib": timer.evict_bytes // 2**20,
            **stats[name],
        }
        for name, pairs in times.items()
    }


def _memory(
    providers: list[Provider], case: Case, inputs: PeakedCase, settings: Settings
) -> dict[str, dict[str, Any]]:
    """Peaks and operations by name; a failure here is noted in the row and costs no timings."""
    logits_mib = case.logits_bytes / 2**20

    def fields(provider: Provider) -> dict[str, Any]:
        try:
            if settings.device == "cuda":
                usage = cuda_usage(provider, inputs)
            elif settings.memory == "here":
                usage = usage_here(provider, inputs)
            else:
                usage = cpu_usage(provider.name, path)
        except (RuntimeError, subprocess.SubprocessError) as error:
            return {"memory_reason": f"{type(error).__name__}: {error}"[:300]}
        percent = round(100 * usage["peak_extra_mib"]["allocator"] / logits_mib, 2)
        return usage | {"peak_extra_percent_of_logits": percent}

    if settings.device == "cuda" or settings.memory == "here":
        return {provider.name: fields(provider) for provider in providers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.pt"
        torch.save(vars(inputs), path)
        with ThreadPoolExecutor(MEMORY_PROCESSES) as pool:
            names = [provider.name for provider in providers]
            return dict(zip(names, pool.map(fields, providers), strict=True))


def _head_stats(stats: Any) -> dict[str, float | None]:
    """A HeadStats as plain numbers, after backward; nothing for providers without."""
    if stats is None:
        return {}
    values = {name: float(getattr(stats, name)) for name in STATS}
    return {name: value if value == value else None for name, value in values.items()}


def _count_passes(rows: dict[str, Row]) -> None:
    """Operations as passes of 2 N H V; in our Triton kernels, which no profiler sees into, what
    routing left: a forward pass, three times the active part, and the tail's two thin products.

    A head that routes nothing needs three; where fewer were seen the rest is in its own kernels,
    and the row says nothing.
    """
    for row in rows.values():
        operations = row.pop("operations", None)
        active = row.get("active_fraction")
        if row["provider"].startswith("widemargin-triton") and active is not None:
            tail = 0 if row["provider"].endswith("exact") else 2 / BLOCK
            row["passes"] = round(1 + 3 * active + tail, 3)
        elif operations:
            passes = operations / (2 * row["tokens"] * row["hidden_size"] * row["vocab"])
            if passes >= 2.99 or row["provider"].startswith("widemargin"):
                row["passes"] = round(passes, 3)


def _add_ratios(rows: dict[str, Row]) -> None:
    """Times of full logits in the same run over this provider's: above 1 is faster."""
    base = rows.get(BASELINE, {})
    for row in rows.values():
        if "total_ms" in row and "total_ms" in base:
            row["speedup"] = {
                half: round(base[f"{half}_ms"]["median"] / row[f"{half}_ms"]["median"], 3)
                for half in ("forward", "backward", "total")
            }


def _shared_fields(case: Case, inputs: PeakedCase, settings: Settings, commit: Commit) -> Row:
    return {
        "op": "linear_logprob",
        "case": case.name,
        **{
            k: v
            for k, v in dataclasses.asdict(case).items()
            if k not in ("name", "entropy", "standard", "path", "factor")
        },
        "entropy": round(inputs.entropy, 3),
        "sharpness": round(inputs.sharpness, 3),
        **environment(settings.device, commit),
    }
