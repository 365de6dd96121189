"""Markdown: tables, the line that says where a row was measured, and places in pages."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.lib.record import Row

CLOSE = "<!-- /table -->"


def markdown(columns: Iterable[str], lines: Iterable[Iterable[Any]], text: int = 1) -> str:
    """A table; all columns but the first ``text`` are aligned to the right."""
    columns = list(columns)
    aligns = ["---"] * text + ["---:"] * (len(columns) - text)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (columns, aligns, *lines))


def machine(row: Row) -> str:
    """Where and with what a row was measured."""
    load = row.get("load_average")
    busy = f", load {load:.1f} when it began" if load is not None and row["device"] == "cpu" else ""
    commit = (row["commit"] or "no commit")[:9] + (", uncommitted changes" if row["dirty"] else "")
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    return f"{row['device_name']}{threads}{busy}; torch {row['versions']['torch']}; {commit}."


def write_into(path: Path, text: str, name: str) -> None:
    """Put ``text`` between `<!-- table:NAME -->` and `<!-- /table -->` of a Markdown file."""
    mark = f"<!-- table:{name} -->"
    before, opened, rest = path.read_text(encoding="utf-8").partition(mark)
    _, closed, after = rest.partition(CLOSE)
    if not opened or not closed:
        raise SystemExit(f"error: {path} has no {mark} ... {CLOSE}")
    path.write_text(f"{before}{mark}\n{text}\n{CLOSE}{after}", encoding="utf-8")
