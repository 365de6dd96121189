"""The script that finds tile sizes: its candidates, and what it makes of times."""

from __future__ import annotations

import json

import pytest
from widemargin.kernels.linear_logprob import tiles as table
from widemargin.kernels.linear_logprob.tiles import Tile, Tiles

from bench.compile import tune, versions
from bench.compile.candidates import FIELDS, candidates
from tests.kernels.test_triton_compile import python_without_interpreter


def row(field: str, tile: Tile, case: str, ms: float, product: str = "pointers") -> dict:
    shown = {"field": field, "dtype": "bf16", "tile": tile._asdict(), "product": product}
    return {**shown, "case": case, "ms": ms}


def test_the_tables_own_tiles_lead_and_no_candidate_comes_twice() -> None:
    for arch, own in table.HALF.items():
        found = candidates("bf16", arch)
        assert len(set(found)) == len(found)
        for field in FIELDS:
            first = next(c for c in found if c.field == field)
            assert first.tile == getattr(own, field)
    products = {c.product for c in candidates("bf16", 90)}
    assert products == {"pointers", "tma", "library"}
    assert "tma" not in {c.product for c in candidates("bf16", 80)}


def test_the_best_is_the_smallest_mean_ratio_among_the_complete() -> None:
    one, two, three = (Tile(128, 128, 64, 8, n) for n in (2, 3, 4))
    rows = [row(f, one, "a", 1.0) for f in FIELDS if f != "forward"]
    rows += [row("forward", one, "a", 10.0), row("forward", one, "b", 1.0)]
    rows += [row("forward", two, "a", 9.0, "library"), row("forward", two, "b", 1.05, "library")]
    rows += [row("forward", three, "a", 1.0)]  # not reached in case b
    rows += [{**row("forward", three, "b", 0.0), "reason": "no time left"}]
    del rows[-1]["ms"]
    found = tune.best(rows, "bf16")
    assert found is not None
    tiles = Tiles(two, one, one, one)
    assert found == (tiles, "library")
    entry = tune.source(*found)
    assert eval(entry, {"Tiles": Tiles, "Tile": Tile}) == tiles
    assert "bench/head/forwards/library.py" in entry
    assert tune.best(rows[:2], "bf16") is None


@pytest.mark.costly
def test_compile_only_writes_what_fits(tmp_path) -> None:
    out = tmp_path / "tune.json"
    options = ["--arch", "80", "--dtype", "bf16", "--field", "recompute", "--limit", "2"]
    python_without_interpreter(
        "-m", "bench.compile.tune", "--compile-only", *options, "--out", str(out)
    )
    rows = json.loads(out.read_text())["rows"]
    assert [r["field"] for r in rows] == ["recompute"] * 2
    assert rows[0]["fits"] is True
    assert {"tile", "arch", "product"} <= set(rows[0])


def test_a_summary_names_what_is_wrong() -> None:
    fine = {"kernel": "k", "arch": "sm_80", "spill_bytes": 0, "shared_bytes": 1024}
    rows = [
        fine,
        {**fine, "kernel": "spills", "spill_bytes": 8},
        {**fine, "kernel": "large", "shared_bytes": 200 * 1024},
        {**fine, "kernel": "large", "arch": "sm_90", "shared_bytes": 200 * 1024},
        {"kernel": "fails", "arch": "sm_90", "error": "CompilationError: no\nmore"},
    ]
    summary = versions.summary({"triton": "3.6.0", "rows": rows})
    assert summary == {
        "triton": "3.6.0",
        "compiled": 4,
        "failed": {"fails sm_90": "CompilationError: no"},
        "spilled_bytes": {"spills sm_80": 8},
        "too_large": ["large sm_80"],
    }
    good = {"failed": {}, "spilled_bytes": {f"{versions.MAY_SPILL} sm_90": 8}, "too_large": []}
    assert versions.is_fine(good)
    bad = ({"failed": {"a": "no"}}, {"too_large": ["a"]}, {"spilled_bytes": {"a": 8}})
    assert not any(versions.is_fine(good | each) for each in bad)


@pytest.mark.slow
@pytest.mark.parametrize("version", versions.VERSIONS)
def test_every_kernel_compiles_with_other_versions(version: str, tmp_path) -> None:
    """Needs the package index, and a few minutes."""
    assert versions.main([version, "--out", str(tmp_path / "versions.json")]) == 0
