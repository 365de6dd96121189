"""How time and memory grow: `python -m bench.scaling` from the repository root.

Curves: the head against *tokens*, *vocab* and *hidden_size*, each alone; against the *active*
fraction that routing leaves, with the crossing to the dense path; a whole model's forward and
backward against *sequence* length (`steps`); pairs/s against *ranks*
(`ranks`). The point that the curves of sizes have in common is measured once. Three
minutes on an idle pair of cores. On CUDA the head's curves only, at larger sizes, and with TRL's
head, which costs a CPU about as much as all others together (`bench.head` has it there).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from widemargin.kernels.linear_logprob import TAIL_EPS

from bench.head.harness import Settings, measure
from bench.head.providers import PROVIDERS, Provider
from bench.lib.cases import Case
from bench.lib.record import Commit, Row, add_output_options, destination, environment, writer

SIZES = {"tokens": "tokens N", "vocab": "vocabulary V", "hidden_size": "hidden size H"}
CURVES = (*SIZES, "active", "sequence", "ranks")
BASES = {
    "cpu": Case("scaling", 512, 256, 32768, standard=False),
    "cuda": Case("scaling", 4096, 2048, 65536, "bfloat16", standard=False),
    "tiny": Case("scaling", 32, 32, 1024, standard=False),
}
FACTORS: dict[str, tuple[float, ...]] = {
    "tokens": (0.25, 1, 4),
    "vocab": (0.25, 1, 4),
    "hidden_size": (0.5, 1, 2),
}
ENTROPIES = (0.5, 1.5, 4.0)
FLAT_EPS = (TAIL_EPS, 2**-15)
"""Flat inputs leave much active at the default; with a smaller bound nearly all is."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--curves", nargs="+", choices=CURVES, help="default: all for the device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--base", choices=BASES, help="sizes to start from (default: the device's)")
    parser.add_argument("--repeats", type=int, default=2, help="timed rounds (default 2)")
    parser.add_argument(
        "--budget-s", type=float, default=4, help="of a point: no round begins after it (default 4)"
    )
    add_output_options(parser, "scaling_<device>.json")
    return parser.parse_args(arguments)


def heads(device: str) -> list[Provider]:
    backend = "triton" if device == "cuda" else "torch"
    names = ["full-logits", f"widemargin-{backend}-mean", f"widemargin-{backend}-exact"]
    return [PROVIDERS[name] for name in names + ["trl-chunked"] * (device == "cuda")]


def head_rows(curve: str, base: Case, rows_at: Callable[[Case], list[Row]]) -> Iterator[Row]:
    """One size varied, the others as in ``base``."""
    for factor in FACTORS[curve]:
        case = replace(base, **{curve: round(getattr(base, curve) * factor)})
        for row in rows_at(case):
            yield row | {"op": "scaling", "curve": curve}


def active_rows(base: Case, settings: Settings, commit: Commit) -> Iterator[Row]:
    """From nearly certain tokens to flat ones, and to a bound under which nearly all is active."""
    _, mean, exact = heads(settings.device)[:3]
    forward: Any = mean.forward  # linear_logprob, which a provider's callers give no tail_eps
    cases = [(replace(base, entropy=entropy), TAIL_EPS) for entropy in ENTROPIES]
    cases += [(replace(base, distribution="flat"), eps) for eps in FLAT_EPS]
    for case, eps in cases:
        ours = replace(mean, forward=partial(forward, tail_eps=eps))
        for row in measure(case, [ours, exact], settings, commit):
            yield row | {"op": "scaling", "curve": "active", "tail_eps": eps}


def crossover(rows: list[Row]) -> float | None:
    """The active fraction from which on tail "mean" takes as long as "exact", if there is one.

    Args:
        rows: of the curve *active*: of each case one of either tail.
    """
    points = sorted(
        (mean["active_fraction"], mean["total_ms"]["median"] / exact["total_ms"]["median"])
        for mean, exact in both_tails(rows)
    )
    if not points or points[-1][1] < 1:
        return None
    for (low, before), (high, after) in reversed(list(pairwise(points))):
        if before < 1:
            return low + (high - low) * (1 - before) / (after - before)
    return points[0][0]


def both_tails(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Rows of the curve *active* that were timed, as (mean, exact) of the same case."""

    def case(row: Row) -> tuple[Any, ...]:
        return row["entropy"], row["distribution"], row["tail_eps"]

    timed = [row for row in rows if "total_ms" in row]
    exact = {case(row): row for row in timed if row["provider"].endswith("exact")}
    mean = [row for row in timed if row["provider"].endswith("mean")]
    return [(row, exact[case(row)]) for row in mean if case(row) in exact]


def line(row: Row) -> str:
    """A row as one line of text."""
    curve: str = row["curve"]
    at = row.get({"active": "active_fraction", "sequence": "length"}.get(curve, curve))
    name = f"{curve:12} {at if at is None else format(at, '.4g'):>8}  {row['provider']:26}"
    if "reason" in row:
        return f"{name} {row['reason']}"
    if "pairs_per_s" in row:
        return f"{name} {row['pairs_per_s']:8.2f} pairs/s  {row['case']}"
    peak = row.get("peak_extra_mib", {}).get("allocator", float("nan"))
    return f"{name} {row['total_ms']['median']:8.1f} ms  {peak:8.1f} MiB"


def rows_of(options: argparse.Namespace, commit: Commit) -> Iterator[Row]:
    base = BASES[options.base or options.device]
    cuda = options.device == "cuda"
    settings = Settings(options.device, options.repeats, 2 * cuda, options.budget_s, "here")
    shared = {"op": "scaling", **environment(options.device, commit)}
    small = (base.hidden_size, 2 * base.hidden_size) if options.base == "tiny" else None
    rows_at = cache(lambda case: measure(case, heads(options.device), settings, commit))
    for curve in options.curves or (CURVES[:4] if cuda else CURVES):
        if curve in SIZES:
            yield from head_rows(curve, base, rows_at)
        elif curve == "active":
            yield from active_rows(base, settings, commit)
        elif curve == "sequence":
            from bench.scaling.steps import LENGTHS, sequence_rows

            yield from (shared | row for row in sequence_rows(small or LENGTHS))
        else:
            from bench.scaling.ranks import rank_rows

            yield from (shared | row for row in rank_rows(*((1, 4) if small else ())))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: this machine has no CUDA device", file=sys.stderr)
        return 2
    out, commit = destination(options, f"scaling_{options.device}.json")
    write = writer(out)
    rows: list[Row] = []
    for row in rows_of(options, commit):
        rows.append(row)
        print(line(row), flush=True)
        write(rows)
    at = crossover([row for row in rows if row["curve"] == "active"])
    if at is not None:
        print(f"mean takes as long as exact from an active fraction of {at:.2f} on")
    ours = [row for row in rows if row["provider"].startswith("widemargin")]
    return 1 if any(row.get("gate") in ("wrong", "failed to run") for row in ours) else 0
