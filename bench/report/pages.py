"""Tables, pictures and the page of results, from JSON alone: `python -m bench.report`.

Without arguments: bench/results/*.json into README.md's claim and table, docs/results.md, tables
of other pages and the pictures beside the JSON. With another folder the page goes
there, and nothing else changes.
"""

import argparse
import os
import sys
from pathlib import Path

from bench.head import plot as head_plot
from bench.lib.record import RESULTS, ROOT
from bench.lib.table import write_into
from bench.report import page
from bench.report import readme as front
from bench.scaling import plot as scaling_plot
from bench.training import plot as training_plot

HEAD_PAGE = ROOT / "docs" / "how-the-head-works.md"
KERNEL_PAGE = ROOT / "docs" / "kernel.md"
HOW_PAGE = ROOT / "docs" / "how-it-works.md"
PERFORMANCE_PAGE = ROOT / "docs" / "performance.md"
DRAW = {
    "head": head_plot.draw,
    "active": head_plot.draw_active,
    "training": training_plot.draw,
    "scaling": scaling_plot.draw,
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="of JSON files")
    parser.add_argument("--page", type=Path, help="default: docs/results.md, or FOLDER/results.md")
    parser.add_argument("--readme", type=Path, help="whose tables to renew (default: README.md)")
    parser.add_argument("--no-pictures", action="store_true", help="text only")
    return parser.parse_args(arguments)


def draw(files: list[page.File]) -> list[Path]:
    """Draw every file's pictures beside it."""
    drawn = []
    for file in files:
        for name, rows in file.pictures().items():
            drawn.append(file.path.parent / name)
            DRAW[file.kind](rows, drawn[-1])
    return drawn


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    folder = options.folder.resolve()
    files = page.read_files(folder)
    if not files:
        print(f"error: {folder} has no JSON of results; `make bench` writes some", file=sys.stderr)
        return 2
    published = folder == RESULTS
    out = options.page or (ROOT / "docs" if published else folder) / "results.md"
    readme = options.readme or (ROOT / "README.md" if published else None)
    if not options.no_pictures:
        for path in draw(files):
            print(f"wrote {os.path.relpath(path)}")
    link = os.path.relpath(folder, out.resolve().parent)
    out.write_text(page.page(files, "" if link == "." else f"{link}/"), encoding="utf-8")
    print(f"wrote {os.path.relpath(out)}")
    if readme is not None:
        for name, text in (("claim", front.claim), ("training", front.table)):
            write_into(readme, text(files), name)
        print(f"wrote the tables in {os.path.relpath(readme)}")
    if published:
        for path, table, name in (
            (HEAD_PAGE, page.active_table(files), "active"),
            (HEAD_PAGE, page.adamw_table(files), "adamw"),
            (KERNEL_PAGE, page.head_table(files), "head"),
            (HOW_PAGE, front.share_table(), "shares"),
            (PERFORMANCE_PAGE, page.hybrid_table(files), "hybrids"),
        ):
            write_into(path, table, name)
            print(f"wrote the table in {os.path.relpath(path)}")
    return 0
