"""Find the head's tile sizes on this GPU: `python -m bench.compile.tune --out tune.json`.

For each kernel and dtype: every candidate that compiles for the chip without spills is checked
against the table's own tile and timed on the cases' sizes; the fastest over all cases becomes the
row of `kernels/linear_logprob/tiles.py`, which is printed. Each kernel has `--kernel-s` seconds;
candidates that it does not reach are listed as such.

`--compile-only` needs no GPU: it says which candidates fit, for `--arch`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from widemargin.kernels.linear_logprob import TAIL_EPS
from widemargin.kernels.linear_logprob.tiles import Tile, Tiles

from bench.compile.candidates import FIELDS, Candidate, candidates, verdicts
from bench.lib.cases import CASES, Case
from bench.lib.exact import relative_error
from bench.lib.record import find_commit, refused
from bench.lib.timing import timed

REPEATS = 7
TOLERANCE = 5e-3  # relative, between two tiles: both round to bf16
CASES_BY_DTYPE = {
    "bf16": [CASES["llama3-8b"], CASES["gemma2-2b"]],
    "fp32": [Case("fp32", 2048, 2048, 32000)],
}


class Bench:
    """One case on the GPU: runs any candidate, and says how far its result is from the first's."""

    def __init__(self, case: Case) -> None:
        from widemargin.kernels.linear_logprob.triton_backward import Launches
        from widemargin.kernels.linear_logprob.triton_forward import forward
        from widemargin.kernels.linear_logprob.triton_routing import choose
        from widemargin.kernels.linear_logprob.types import HeadCall

        inputs = case.build("cuda")
        self.case, self.targets = case, inputs.targets
        self.call = HeadCall(inputs.hidden, inputs.weight, None, 1.0, None, inputs.hidden.dtype)
        saved = forward(self.call, self.targets, keep=True, profile=True, tops=True)
        grad = inputs.coefficients
        scored = torch.ones_like(inputs.targets, dtype=torch.bool)
        routing = choose(self.call, saved, grad, scored, TAIL_EPS, weighted=True)
        self.launches = Launches.of(self.call, saved, routing, grad)
        self.cells = int(self.launches.cells.slices[1])
        self.launches.recompute(0)
        self.d_weight = torch.zeros_like(inputs.weight)
        self.d_hidden = torch.zeros_like(inputs.hidden, dtype=torch.float32)
        self.wanted: dict[str, torch.Tensor] = {}

    def operations(self, field: str) -> int:
        """Of the products a kernel does: one pass, or the first slice's cells."""
        case = self.case
        each = 2 * case.hidden_size
        return each * (case.tokens * case.vocab if field == "forward" else self.cells * 128 * 128)

    def run(self, candidate: Candidate) -> Callable[[], torch.Tensor]:
        """A function that launches the kernel and returns what it wrote."""
        if candidate.field == "forward":
            return partial(self._partial_lse, _launch_of(candidate.product), candidate.tile)
        launches = self.launches
        launches.tiles = launches.tiles._replace(**{candidate.field: candidate.tile})
        if candidate.field == "recompute":
            return lambda: (launches.recompute(0), launches.work[: self.cells])[1]
        if candidate.field == "d_weight":
            return lambda: (launches.write_weight(0, self.d_weight), self.d_weight)[1]
        return lambda: (launches.add_hidden(0, self.d_hidden), self.d_hidden)[1]

    def _partial_lse(self, launch: Any, tile: Tile) -> torch.Tensor:
        from widemargin.kernels.linear_logprob.triton_forward import forward_by

        return forward_by(
            launch, tile, self.call, self.targets, keep=True, profile=True, tops=True
        ).partial_lse

    def measure(self, candidate: Candidate) -> dict[str, Any]:
        run = self.run(candidate)
        self.d_hidden.zero_()
        found = run()
        wanted = self.wanted.setdefault(candidate.field, found.clone())
        error = relative_error(found, wanted.double())
        if not error <= TOLERANCE:
            return {"reason": f"differs from the table's tile by {error:.1e}"}
        times = [timed(run, cuda=True)[1] for _ in range(REPEATS)]
        ms = statistics.median(times)
        return {
            "ms": round(ms, 4),
            "min_ms": round(min(times), 4),
            "tflops": round(self.operations(candidate.field) / ms / 1e9, 1),
        }


def _launch_of(product: str) -> Any:
    if product == "pointers":
        from widemargin.kernels.linear_logprob.triton_forward import launch

        return launch
    return importlib.import_module(f"bench.head.forwards.{product}").launch


def tune(
    usable: list[Candidate], cases: list[Case], kernel_s: float
) -> Iterator[tuple[Candidate, str, dict[str, Any]]]:
    """(candidate, case, what was measured) of everything that is reached in time."""
    for case in cases:
        bench = Bench(case)
        for field in FIELDS:
            begin = time.monotonic()
            for candidate in (c for c in usable if c.field == field):
                if time.monotonic() - begin > kernel_s / len(cases):
                    yield candidate, case.name, {"reason": "no time left"}
                    continue
                try:
                    yield candidate, case.name, bench.measure(candidate)
                except Exception as error:  # out of shared memory, say: the others still count
                    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    yield candidate, case.name, {"reason": reason}
            bench.wanted.clear()
        del bench
        torch.cuda.empty_cache()


def best(rows: list[dict[str, Any]], dtype: str) -> tuple[Tiles, str] | None:
    """Of each kernel the tile with the smallest mean of time over the case's fastest time.

    Returns:
        the tiles, and the forward's product: see `Candidate`.
    """
    chosen: dict[str, Tile] = {}
    forward_product = "pointers"
    for field in FIELDS:
        mine = [r for r in rows if r["field"] == field and r["dtype"] == dtype and "ms" in r]
        if not mine:
            return None
        cases = {row["case"] for row in mine}  # those that some candidate was reached in
        fastest = {c: min(r["ms"] for r in mine if r["case"] == c) for c in cases}
        ratios: dict[tuple[Tile, str], list[float]] = {}
        for row in mine:
            key = (Tile(**row["tile"]), row["product"])
            ratios.setdefault(key, []).append(row["ms"] / fastest[row["case"]])
        most = max(map(len, ratios.values()))
        complete = {key: r for key, r in ratios.items() if len(r) == most}
        tile, product = min(complete, key=lambda key: statistics.mean(complete[key]))
        chosen[field] = tile
        if field == "forward":
            forward_product = product
    return Tiles(**chosen), forward_product


def source(tiles: Tiles, product: str) -> str:
    """An entry as it stands in `kernels/linear_logprob/tiles.py`."""
    lines = [
        f"    {name}=Tile({', '.join(map(str, tile))}),"
        for name, tile in zip(FIELDS, tiles, strict=True)
    ]
    if product != "pointers":
        lines[0] += f"  # of bench/head/forwards/{product}.py"
    return "\n".join(["Tiles(", *lines, ")"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.tune", description=__doc__)
    parser.add_argument("--compile-only", action="store_true", help="no GPU: which candidates fit")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="for --compile-only")
    parser.add_argument("--field", nargs="+", choices=FIELDS, default=FIELDS)
    parser.add_argument("--dtype", nargs="+", choices=CASES_BY_DTYPE, default=["bf16", "fp32"])
    parser.add_argument("--limit", type=int, help="candidates per kernel and dtype, at most")
    parser.add_argument("--kernel-s", type=float, default=20, help="seconds per kernel and dtype")
    parser.add_argument("--processes", type=int, default=1, help="that compile at a time")
    parser.add_argument("--commit", help="what is measured, where there is no git repository")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    commit = find_commit(options.commit)
    if options.out and refused(options.out, commit):
        raise SystemExit(2)
    if options.compile_only:
        archs = options.arch
    else:
        major, minor = torch.cuda.get_device_capability()
        archs = [10 * major + minor]
    rows: list[dict[str, Any]] = []
    for arch in archs:
        for dtype in options.dtype:
            rows += _one_dtype(dtype, arch, options)
    import triton

    result: dict[str, Any] = {
        **dataclasses.asdict(commit),
        "versions": {"torch": str(torch.__version__), "triton": triton.__version__},
        "rows": rows,
    }
    if not options.compile_only:
        result["device_name"] = torch.cuda.get_device_name()
        entries = {dtype: best(rows, dtype) for dtype in options.dtype}
        result["entries"] = {dtype: e and source(*e) for dtype, e in entries.items()}
        for dtype, entry in result["entries"].items():
            print(f"{dtype}, sm_{archs[0]}:\n{entry}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _one_dtype(dtype: str, arch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of every candidate of one dtype, measured or with the reason why not."""
    found: list[Candidate] = []
    for field in options.field:
        found += [c for c in candidates(dtype, arch) if c.field == field][: options.limit]
    reasons = verdicts(found, arch, options.processes)

    def row(candidate: Candidate, **fields: Any) -> dict[str, Any]:
        shown = {**candidate._asdict(), "tile": candidate.tile._asdict(), "arch": f"sm_{arch}"}
        line = " ".join(map(str, (*candidate[:2], candidate.product, *candidate.tile)))
        print(f"sm_{arch} {line}:", *(f"{k} {v}" for k, v in fields.items()), flush=True)
        return shown | fields

    usable = [candidate for candidate in found if reasons[candidate] is None]
    rows = [row(c, reason=reason) for c, reason in reasons.items() if reason is not None]
    if options.compile_only:
        return rows + [row(candidate, fits=True) for candidate in usable]
    measured = tune(usable, CASES_BY_DTYPE[dtype], options.kernel_s)
    return rows + [row(candidate, case=case, **fields) for candidate, case, fields in measured]


if __name__ == "__main__":
    main()
