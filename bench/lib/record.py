"""What every file of results says about itself, and where it may be written.

Rows carry the commit, the machine and the versions they were measured with; `bench/results/` takes
rows of committed code only.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.lib.timing import device_name

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
GENERATED = (":!bench/results", ":!docs", ":!README.md")
"""Files that may differ from the commit: results, and the pages that show them."""
SCHEMA = 1
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "numpy")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Commit:
    """The code that was measured; `dirty` when the tree differs from the commit."""

    commit: str | None
    dirty: bool


def find_commit(given: str | None = None) -> Commit:
    """From git, or the given one where there is no repository.

    Files of results, and the pages made from them, do not count.

    Raises:
        ValueError: another commit is given than the repository is at.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD") if (ROOT / ".git").exists() else None
    if head is None:
        return Commit(given, dirty=given is None)
    if given is not None and not head.startswith(given):
        raise ValueError(f"--commit is {given}, but the repository is at {head}: leave it out")
    return Commit(head, dirty=bool(git("status", "--porcelain", "--", ".", *GENERATED)))


def add_output_options(parser: argparse.ArgumentParser, default: str) -> None:
    """`--out`, `--commit` and `--allow-dirty`; ``default`` is a name in bench/results."""
    parser.add_argument("--out", type=Path, help=f"default: bench/results/{default}")
    parser.add_argument("--commit", help="what is measured, where there is no git repository")
    parser.add_argument("--allow-dirty", action="store_true", help="store uncommitted results")


def refused(out: Path, commit: Commit, allow_dirty: bool = False) -> bool:
    """Whether rows of this code may not be written there; then it has been said why."""
    refuses = commit.dirty and not allow_dirty and out.resolve().is_relative_to(RESULTS)
    if refuses:
        print(
            "error: the tree has uncommitted changes, so nothing is written to bench/results: "
            "commit first, or name another --out, or pass --allow-dirty",
            file=sys.stderr,
        )
    return refuses


def destination(options: argparse.Namespace, default: str) -> tuple[Path, Commit]:
    """Where the options of `add_output_options` put rows, and the code that is measured.

    Raises:
        SystemExit: rows of this code may not be written there.
    """
    out = (options.out or RESULTS / default).resolve()
    commit = find_commit(options.commit)
    if refused(out, commit, options.allow_dirty):
        raise SystemExit(2)
    return out, commit


def environment(device: str, commit: Commit) -> Row:
    """The part of a row that says where it was measured, and what with."""
    return {
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **versions()},
        **dataclasses.asdict(commit),
    }


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed | {"torch": str(torch.__version__)}


def writer(out: Path) -> Callable[[Iterable[Row]], None]:
    """A function that writes all rows so far; called again it replaces them."""
    created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(rows: Iterable[Row]) -> None:
        content = {"schema": SCHEMA, "created": created, "rows": list(rows)}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    return write


def read_rows(path: Path) -> list[Row]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def keep_others(path: Path, new: Iterable[Row], keys: Iterable[str]) -> list[Row]:
    """The file's rows that measured something else than the new ones do, by these keys."""
    if not path.is_file():
        return []
    keys = tuple(keys)
    replaced = [[row.get(key) for key in keys] for row in new]
    return [row for row in read_rows(path) if [row.get(key) for key in keys] not in replaced]
