"""Registers, spills, shared memory and instructions of every kernel, compiled without a GPU.

`python -m bench.compile.resources [NAME ...] [--out FILE]` compiles the kernels of `KERNELS`
for each of their architectures, writes bench/results/resources.json and prints it as a table. With
names only those are compiled, and nothing is written unless `--out` says where. Results name the
sources that they are of, so that tests compile only what has changed since.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from widemargin.trainer.files import digest

from bench.compile.kernels import KERNELS, Kernel
from bench.compile.triton_compile import compile_resources
from bench.lib.table import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "resources.json"
SOURCES = (
    "kernels/**/triton*.py",
    *(f"kernels/linear_logprob/{name}.py" for name in ("cells", "routing", "tiles")),
    *(f"bench/compile/{name}.py" for name in ("kernels", "triton_compile")),
    "bench/head/forwards/*.py",
)


def sources() -> str:
    """A digest of the files that make a kernel's binary, apart from triton."""
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    return digest(path.read_bytes() for path in files)


def measure(kernels: list[Kernel]) -> dict[str, Any]:
    """Triton's version, `sources`, and one row per kernel and architecture; a failure is a row."""
    import triton

    rows = []
    for kernel in kernels:
        for arch in kernel.archs:
            row: dict[str, Any] = {"kernel": kernel.name, "arch": f"sm_{arch}"}
            try:
                row |= compile_resources(*kernel.source(), arch=arch)
            except Exception as error:  # of the compiler; the other kernels still count
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
    return {"triton": triton.__version__, "sources": sources(), "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if "error" in row:
            found = ["–", "–", "–", "–", row["error"].splitlines()[0].replace("|", "/")]
        else:
            counts = ", ".join(f"{count} {opcode}" for opcode, count in row["instructions"].items())
            shared = f"{row['shared_bytes'] / 1024:.2f}".rstrip("0").rstrip(".")
            outside = row["outside_loop"] or "–"
            found = [row["registers"], row["spill_bytes"], shared, outside, counts or "–"]
        lines.append([row["kernel"], row["arch"], *found])
    columns = ("kernel", "arch", "registers", "spilled, bytes", "shared, KiB")
    columns += ("outside the main loop", "instructions")
    return markdown(columns, lines, text=2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.resources", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginning of kernels' names")
    parser.add_argument("--out", type=Path, help=f"where to write, by default {RESULTS}")
    arguments = parser.parse_args()
    names = tuple(arguments.names)
    kernels = [k for k in KERNELS if not names or k.name.startswith(names)]
    if not kernels:
        parser.error(f"no kernel's name begins with {' or '.join(names)}")
    results = measure(kernels)
    out = arguments.out or (None if names else RESULTS)
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
