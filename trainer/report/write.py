"""Runs as one self-contained HTML page or an image, and as a few lines for the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, refusals
from ..monitor.history import Run, load_run
from .compare import comparison_drawings, comparison_headline, comparison_lines, render_comparison
from .groups import group_runs
from .marks import Drawing
from .png import write_png
from .run_page import render_run, run_drawings, run_headline, run_lines


def write_report(
    run_dirs: Path | Sequence[Path], out: Path | None = None, *, form: str = "html"
) -> Path:
    """Write the report of a run, or of several in comparison.

    Args:
        run_dirs: output folders of runs; those that differ in their seeds alone are one group.
        out: the file; None for ``report.html`` (or ``.png``) in the run's folder, or in the one
            that holds all the runs.
        form: "html", or "png" for the charts alone as one image.
    """
    runs = load_runs(run_dirs)
    if out is None:
        folder = os.path.commonpath([run.folder.absolute() for run in runs])
        out = (runs[0].folder if len(runs) == 1 else Path(folder)) / f"report.{form}"
    out = Path(out)
    with refusals(f"report {out}: cannot be written", OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
        if form == "png":
            write_png(*_title_and_drawings(runs), out)
        else:
            single = len(runs) == 1
            page = render_run(runs[0]) if single else render_comparison(group_runs(runs))
            out.write_text(page, encoding="utf-8")
    return out


def _title_and_drawings(runs: Sequence[Run]) -> tuple[str, list[Drawing]]:
    if len(runs) == 1:
        lines, ridges = run_drawings(runs[0])
        return run_headline(runs[0]), lines + ridges
    groups = group_runs(runs)
    lines, ridges = comparison_drawings(groups)
    return comparison_headline(groups), lines + ridges


def load_runs(run_dirs: Path | Sequence[Path]) -> list[Run]:
    """The runs of these folders, each once."""
    several = not isinstance(run_dirs, (str, Path))
    folders = [Path(folder) for folder in (run_dirs if several else [run_dirs])]
    if not folders:
        raise UserError("report: name the output folder of a run, or several")
    return [load_run(folder) for folder in dict.fromkeys(folders)]


def summary_lines(run_dirs: Path | Sequence[Path]) -> list[str]:
    """The headline and a table of the main numbers as plain text: before and after, or by group."""
    runs = load_runs(run_dirs)
    return run_lines(runs[0]) if len(runs) == 1 else comparison_lines(group_runs(runs))
