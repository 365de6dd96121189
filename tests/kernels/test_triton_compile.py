"""Kernels compile for real chips, with no GPU here: they fit, do not spill, use the tensor cores.

Compiling happens in another process, since this one may have imported triton as an interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bench.compile.kernels import KERNELS, Kernel
from bench.compile.resources import RESULTS, sources, table
from bench.compile.triton_compile import SHARED_LIMIT_BYTES, TENSOR_CORE

REPOSITORY = Path(__file__).resolve().parents[2]
TARGETS = [
    pytest.param(kernel, arch, id=f"{kernel.name} sm_{arch}")
    for kernel in KERNELS
    for arch in kernel.archs
]


def python_without_interpreter(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(folder: Path) -> dict[str, Any]:
    out = folder / "resources.json"
    print(python_without_interpreter("-m", "bench.compile.resources", "--out", str(out)))
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, Any]:
    """The committed results where they are of these sources and this triton; compiled otherwise."""
    kept = json.loads(RESULTS.read_text())
    if (kept["triton"], kept["sources"]) == (version("triton"), sources()):
        return kept
    return compiled(tmp_path_factory.mktemp("resources"))


@pytest.mark.costly
@pytest.mark.parametrize(("kernel", "arch"), TARGETS)
def test_compiles_fits_and_does_not_spill(kernel: Kernel, arch: int, measured) -> None:
    (row,) = (
        row
        for row in measured["rows"]
        if row["kernel"] == kernel.name and row["arch"] == f"sm_{arch}"
    )
    assert "error" not in row, row["error"]
    assert row["registers"] > 0
    assert row["spill_bytes"] == 0
    assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[arch]
    if kernel.needs_tensor_cores:
        wanted = ("HGMMA", "QGMMA", "IGMMA") if arch == 90 else TENSOR_CORE
        assert any(opcode in row["instructions"] for opcode in wanted), row["instructions"]


@pytest.mark.costly
@pytest.mark.parametrize("kernel", ["head forward bf16", "head forward tma bf16"])
def test_the_forwards_epilogue_is_lean(kernel: str, measured) -> None:
    """On sm_90, a thread and tile, with tops: most tiles, and the mean with each fourth sampled."""
    outside = {
        row["kernel"]: row["outside_loop"] for row in measured["rows"] if row["arch"] == "sm_90"
    }
    assert outside[kernel] <= 1800
    assert 0.75 * outside[kernel] + 0.25 * outside[f"{kernel} sampled"] <= 2000


def test_names_are_unique() -> None:
    names = [(kernel.name, arch) for kernel in KERNELS for arch in kernel.archs]
    assert len(set(names)) == len(names)


@pytest.mark.costly
@pytest.mark.parametrize("arch", [80, 90])
def test_no_number_of_tokens_compiles_again(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own launch path, with a driver that does nothing in the place of CUDA's."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")  # what Triton 3.10 takes unasked
    printed = python_without_interpreter("-m", "bench.compile.launches", "--arch", str(arch))
    found = json.loads(printed.splitlines()[-1])
    assert found["first"].count("_forward_kernel") == 2  # with and without the entropy
    for kernel in ("_recompute_kernel", "_weight_kernel", "_hidden_kernel"):
        assert found["first"].count(kernel) == arch // 10 - 7  # on sm_90 by descriptors too
    assert len(found["later"]) == 11
    assert {tokens: names for tokens, names in found["later"].items() if names} == {}
    assert found["launched"] == 12 * (2 + 8 * (arch // 10 - 7))
    assert found["unfused"] == []


@pytest.mark.costly
def test_results_are_current(measured) -> None:
    kept = json.loads(RESULTS.read_text())
    if kept["triton"] != measured["triton"]:
        pytest.skip(f"made with triton {kept['triton']}, here is {measured['triton']}")
    assert kept == measured, "run `python -m bench.compile.resources`"


@pytest.mark.slow
def test_compiling_gives_the_results_again(tmp_path) -> None:
    kept = json.loads(RESULTS.read_text())
    if kept["triton"] != version("triton"):
        pytest.skip(f"made with triton {kept['triton']}, here is {version('triton')}")
    assert compiled(tmp_path) == kept


def test_table_shows_an_error_on_one_line() -> None:
    rows = [{"kernel": "k", "arch": "sm_80", "error": "CompilationError: a | b\nmore"}]
    assert table(rows).splitlines()[-1].endswith("| CompilationError: a / b |")


# A product whose accumulators fit in the registers of 8 warps and not in those of 4.
PROBE = """
import json, sys
import triton
import triton.language as tl
from bench.compile.triton_compile import aligned, compile_resources

@triton.jit
def product(a_ptr, b_ptr, c_ptr, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    c = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        a = tl.load(a_ptr + m[:, None] * 4096 + step * K + k[None, :])
        b = tl.load(b_ptr + n[:, None] * 4096 + step * K + k[None, :])
        c = tl.dot(a, b.T, c)
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)

signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "steps": "i32"}
attrs = aligned("a_ptr", "b_ptr", "c_ptr")
for warps, columns in ((8, 128), (4, 256)):
    for arch in (80, 90):
        found = compile_resources(
            product, signature, {"M": 128, "N": columns, "K": 64}, attrs,
            {"num_warps": warps, "num_stages": 3}, arch,
        )
        print(json.dumps(found))
for signature in ({}, signature | {"nothing": "i32"}):
    try:
        compile_resources(product, signature, {"M": 128, "N": 128, "K": 64})
    except ValueError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.costly
def test_reading_the_binary_finds_spills_tensor_cores_and_copies(tmp_path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    run = "import runpy, sys; sys.path.insert(0, '.'); runpy.run_path(sys.argv[1])"
    lines = python_without_interpreter("-c", run, str(probe)).splitlines()
    sm_80, sm_90, spilling, _, *errors = map(json.loads, lines)
    assert sm_80["spill_bytes"] == sm_90["spill_bytes"] == 0
    assert sm_80["instructions"]["HMMA"] > 0
    assert sm_90["instructions"]["HGMMA"] > 0
    assert sm_80["instructions"]["LDGSTS"] > 0
    assert 200 < sm_90["outside_loop"] < 600  # 64 accumulators to store by each thread
    assert 64 * 1024 <= sm_80["shared_bytes"] <= SHARED_LIMIT_BYTES[80]
    assert spilling["registers"] == 255
    assert spilling["spill_bytes"] > 0
    assert spilling["instructions"]["STL"] > 0
    assert "misses ['a_ptr'" in errors[0]
    assert "does not know ['nothing']" in errors[1]


INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
from bench.compile.kernels import KERNELS
from bench.compile.resources import measure
print(measure(KERNELS[:1])["rows"][0]["error"])
"""


@pytest.mark.costly
def test_compiling_in_the_interpreter_is_an_error_that_says_so() -> None:
    assert "unset TRITON_INTERPRET" in python_without_interpreter("-c", INTERPRETED)
