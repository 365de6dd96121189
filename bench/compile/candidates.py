"""Tiles that the head's kernels could run with, and which of them fit a chip. No GPU needed."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from widemargin.kernels.linear_logprob import tiles as table
from widemargin.kernels.linear_logprob.tiles import Tile

from bench.compile.kernels import head_source
from bench.compile.triton_compile import SHARED_LIMIT_BYTES, compile_resources

FIELDS = ("forward", "recompute", "d_weight", "d_hidden")


class Candidate(NamedTuple):
    """A tile of one kernel; ``field`` is that of `Tiles`.

    product: how the forward gets its logits: "pointers", as the package does, or a module of
    `bench.head.forwards`.
    """

    field: str
    dtype: str
    tile: Tile
    product: str = "pointers"

    @property
    def kernel(self) -> str:
        forward = {
            "pointers": "_forward_kernel",
            "tma": "_forward_tma_kernel",
            "library": "_statistics_kernel",
        }
        others = {
            "recompute": "_recompute_kernel",
            "d_weight": "_weight_kernel",
            "d_hidden": "_hidden_kernel",
        }
        return others.get(self.field) or forward[self.product]


def candidates(dtype: str, arch: int) -> list[Candidate]:
    """Most promising first, since time may run out; the table's own tile leads."""
    own = table.FULL if dtype == "fp32" else table.HALF[max(a for a in table.HALF if a <= arch)]
    found = [Candidate(f, dtype, getattr(own, f)) for f in FIELDS]
    if dtype == "fp32":
        found += [
            Candidate(field, dtype, Tile(128, columns, depth, 8, stages))
            for field in FIELDS
            for columns, depth, stages in ((64, 32, 3), (128, 16, 3), (128, 32, 3), (64, 16, 4))
            if field != "recompute" or columns == 128
            if field != "forward" or columns == 128
        ]
        return list(dict.fromkeys(found))
    stages = (3, 4, 5) if arch >= 90 else (3, 4)
    if arch >= 90:
        shapes = ((128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 5))
        shapes += ((128, 128, 64, 4, 5), (128, 128, 128, 8, 3), (256, 128, 64, 8, 4))
        found += [Candidate("forward", dtype, Tile(*s), "tma") for s in shapes]
    found += [
        Candidate("forward", dtype, Tile(128, 128, chunk, warps, 1), "library")
        for chunk in (2048, 8192, 1024, 4096)
        for warps in (8, 4)
    ]
    found += [
        Candidate("forward", dtype, Tile(128, columns, depth, warps, n, together))
        for columns, depth, warps, n, together in (
            *((256, 64, 8, 3, together) for together in (8, 32, 64)),
            *((256, 64, 8, n, 16) for n in stages),
            *((128, 64, warps, n, 16) for warps in (8, 4) for n in stages),
            *((256, 32, 8, n, 16) for n in (3, 4)),
        )
    ]
    found += [
        Candidate("recompute", dtype, Tile(128, 128, depth, warps, n))
        for depth, warps in ((64, 8), (64, 4), (32, 8))
        for n in stages
    ]
    found += [
        Candidate(field, dtype, Tile(128, columns, depth, warps, n))
        for field in ("d_weight", "d_hidden")
        for columns, depth, warps in ((256, 64, 8), (128, 64, 8), (128, 64, 4), (256, 32, 8))
        for n in stages
    ]
    if arch >= 90:
        found = [each for c in found for each in _by_both(c)]
    return list(dict.fromkeys(found))


def _by_both(candidate: Candidate) -> list[Candidate]:
    """A kernel of backward with its tile as it is, and with the other kind of operands."""
    if candidate.field == "forward":
        return [candidate]
    other = candidate.tile._replace(descriptors=not candidate.tile.descriptors)
    return [candidate, candidate._replace(tile=other)]


def verdict(job: tuple[Candidate, int]) -> str | None:
    """None where a candidate compiles without spills and fits, else the reason why it does not."""
    candidate, arch = job
    try:
        found = compile_resources(
            *head_source(candidate.kernel, candidate.dtype, candidate.tile), arch=arch
        )
    except Exception as error:  # of the compiler
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if found["spill_bytes"]:
        return f"spills {found['spill_bytes']} bytes"
    # A chip that is not listed has at least what sm_80 has.
    limit = SHARED_LIMIT_BYTES.get(arch, SHARED_LIMIT_BYTES[80])
    needs = found["shared_bytes"]
    return f"needs {needs} of {limit} bytes of shared memory" if needs > limit else None


def verdicts(found: list[Candidate], arch: int, processes: int) -> dict[Candidate, str | None]:
    jobs = [(candidate, arch) for candidate in found]
    if processes < 2:
        return dict(zip(found, map(verdict, jobs), strict=True))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return dict(zip(found, pool.map(verdict, jobs), strict=True))
