"""Every kernel compiled with other versions of Triton than the one installed, without a GPU.

`python -m bench.compile.versions [VERSION ...]` unpacks each version from the package index into
build/ and runs `bench.compile.resources` with it in a process. It prints what fails, spills, or
takes more shared memory than its chip has, and writes bench/results/triton_versions.json.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.compile.resources import RESULTS
from bench.compile.triton_compile import SHARED_LIMIT_BYTES
from bench.lib.record import ROOT

VERSIONS = ("3.6.0", "3.9.0")
"""The oldest that pyproject.toml admits, which torch 2.10 and 2.11 bring, and the newest."""
MAY_SPILL = "head forward tma"
"""A contender of the benchmarks, which the package does not launch."""
OUT = RESULTS.parent / "triton_versions.json"


def unpack(version: str) -> Path:
    """The folder of that version, from the package index if it is not there."""
    folder = ROOT / "build" / f"triton-{version}"
    if not (folder / "triton" / "__init__.py").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(folder), f"triton=={version}"], check=True)
    return folder


def compiled_with(version: str) -> dict[str, Any]:
    """What `bench.compile.resources` finds with that version."""
    folder, out = unpack(version), ROOT / "build" / f"triton-{version}.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "bench.compile.resources", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    if found["triton"] != version:
        raise SystemExit(f"error: asked for triton {version}, and {found['triton']} was imported")
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """How many kernels were compiled, and the names of those that are not as they should be."""
    rows = found["rows"]
    fine = [row for row in rows if "error" not in row]
    return {
        "triton": found["triton"],
        "compiled": len(fine),
        "failed": {_name(row): row["error"].splitlines()[0] for row in rows if "error" in row},
        "spilled_bytes": {_name(row): row["spill_bytes"] for row in fine if row["spill_bytes"]},
        "too_large": [_name(row) for row in fine if row["shared_bytes"] > _limit(row)],
    }


def is_fine(summary: dict[str, Any]) -> bool:
    """Whether each kernel of the package runs, and keeps all values in registers."""
    spilled = [name for name in summary["spilled_bytes"] if not name.startswith(MAY_SPILL)]
    return not (summary["failed"] or summary["too_large"] or spilled)


def _name(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['arch']}"


def _limit(row: dict[str, Any]) -> int:
    return SHARED_LIMIT_BYTES[int(row["arch"].removeprefix("sm_"))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.versions", description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default {OUT}")
    options = parser.parse_args(arguments)
    summaries = [summary(compiled_with(version)) for version in options.versions]
    options.out.write_text(json.dumps({"versions": summaries}, indent=1) + "\n")
    print(json.dumps(summaries, indent=1))
    return int(not all(map(is_fine, summaries)))


if __name__ == "__main__":
    raise SystemExit(main())
