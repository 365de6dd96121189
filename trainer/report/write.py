"""Runs as one self-contained HTML page or an image, and as a few lines for the terminal."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, refusals
from ..monitor.history import Run, load_run
from ..places import unplaced
from ..text import duration, figure
from .charts import run_charts
from .compare import comparison_headline, render_comparison, results_rows
from .groups import Group, group_runs
from .page import changes_table, chart_card, details, page, ridges_card, sample_card, section, text
from .ridges import REWARD_RIDGES, TARGET_RIDGES, Ridges, over_steps
from .samples import sample_strips


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
            from .png import write_png

            write_png(runs, out)
        else:
            many = len(runs) > 1
            content = render_comparison(group_runs(runs)) if many else render(runs[0])
            out.write_text(content, encoding="utf-8")
    return out


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
    if len(runs) > 1:
        return _comparison_lines(group_runs(runs))
    run = runs[0]
    changes = run.changes()
    width = max((len(change.label) for change in changes), default=0)
    first, last = _column_names(run)
    lines = [headline(run)]
    if changes:
        lines += ["", f"{'':{width}}  {first:>10}  {last:>10}"]
    for change in changes:
        before = "" if change.before is None else figure(change.before)
        lines.append(f"{change.label:{width}}  {before:>10}  {figure(change.after):>10}")
    speed = [f"{value} {name}" for name, value in _speed(run)]
    return [*lines, ", ".join(speed)] if speed else lines


def _comparison_lines(groups: Sequence[Group]) -> list[str]:
    rows = [("", [group.label for group in groups]), *results_rows(groups)]
    columns = list(zip(*([label, *values] for label, values in rows), strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [comparison_headline(groups), ""]
    for label, values in rows:
        cells = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([f"{label:{widths[0]}}", *cells]))
    return lines


def headline(run: Run) -> str:
    """One sentence from the numbers: "Held-out accuracy 0.51 → 0.97 in 61 s"."""
    where = "Held-out" if run.prefix() else "Training"
    took = "" if (seconds := run.seconds()) is None else f" in {duration(seconds)}"
    changes = {change.label: change for change in run.changes()}
    for label in ("accuracy", "reward margin", "loss"):
        if change := changes.get(label):
            as_text = "{:.2f}".format if label == "accuracy" else figure
            before = "" if change.before is None else f"{as_text(change.before)} → "
            return f"{where} {label} {before}{as_text(change.after)}{took}"
    return f"Trained {run.last_step():g} steps{took}"


def render(run: Run) -> str:
    """The whole page."""
    title = headline(run)
    body = [_header(run, title)]
    charts = [chart_card(chart, run.last_step()) for chart in run_charts(run)]
    if changes := run.changes():
        where = "Held-out pairs" if run.prefix() else "Training pairs"
        beside, charts = charts[:1], charts[1:]
        body += section(where, [changes_table(changes, *_column_names(run)), *beside])
    body += section(
        "Answers to held-out prompts", [sample_card(s) for s in run.samples], small=True
    )
    body += section("Over the steps of training", charts)
    body += section("Margins, pair by pair", [ridges_card(chart) for chart in run_ridges(run)])
    if run.step_samples:
        body += ["<h2>Answers over the steps of training</h2>", sample_strips(run)]
    body += [_note(run), _how(run)]
    return page(f"{title} · {_name(run)}", [part for part in body if part])


def run_ridges(run: Run) -> list[Ridges]:
    """Histograms of margins over held-out pairs, from the first evaluation to the last."""
    charts = []
    if rewards := run.margins.get("reward_margins"):
        charts.append(over_steps("Reward margins over pairs", REWARD_RIDGES, rewards, "above zero"))
    targets = run.margins.get("target_margins", {})
    if any(histogram.spread for histogram in targets.values()):
        charts.append(over_steps("Target margins over pairs", TARGET_RIDGES, targets, "median"))
    return charts


def _header(run: Run, title: str) -> str:
    when = str(run.started)[:16].replace("T", " ") if run.started else ""
    kicker = " · ".join(text(part) for part in (_name(run), when) if part)
    facts = [
        run.objective.get("name") or run.settings.get("objective"),
        unplaced(run.settings.get("model_name_or_path")),
        unplaced(run.settings.get("dataset") or run.settings.get("dataset_mixer")),
        run.device,
        *(f"{value} {name}" for name, value in _speed(run)),
    ]
    lead = "".join(f"<li>{text(value)}</li>" for value in facts if value)
    top = f'<p class="kicker">{kicker}</p><h1>{text(title)}</h1><ul class="lead">{lead}</ul>'
    return f"<header>{top}</header>"


def _name(run: Run) -> str:
    return str(run.settings.get("run_name") or run.folder.resolve().name)


def _column_names(run: Run) -> tuple[str, str]:
    """What the two columns of numbers are: the run's ends, or the steps nearest to them."""
    points = [
        step
        for key in ("rewards/accuracies", "loss", "rewards/margins")
        for step, value in run.series(run.prefix() + key)
        if math.isfinite(value)
    ]
    if not points:
        return "first", "last"
    first, last = min(points), max(points)
    return ("before" if first == 0 else f"step {first:g}"), (
        "after" if last == run.last_step() else f"step {last:g}"
    )


def _speed(run: Run) -> list[tuple[str, str]]:
    rows = []
    if (pairs_per_s := run.pairs_per_s()) is not None:
        rows.append(("pairs per second", figure(pairs_per_s)))
    memory = [value for _, value in run.series("peak_memory_mib") if math.isfinite(value)]
    if memory and max(memory) > 0:
        rows.append(("MiB at peak", figure(max(memory))))
    shares = [v for _, v in run.series("tokens/computed_vs_padded") if math.isfinite(v)]
    if shares:
        rows.append(("of padded tokens computed", f"{sum(shares) / len(shares):.2f}"))
    mfu = [value for _, value in run.series("mfu") if math.isfinite(value)]
    if mfu:
        rows.append(("MFU", figure(mfu[-1])))
    return rows


def _note(run: Run) -> str:
    """Where logged values were not finite: charts leave a gap there, so say it."""
    counts = run.not_finite()
    if not counts:
        return ""
    listed = ", ".join(f"{text(key)} ({count})" for key, count in counts.items())
    return f'<p class="note">Not finite in the logs, left out above: {listed}.</p>'


def _how(run: Run) -> str:
    """Folding tables of everything it takes to run this again."""
    parts: list[tuple[str, dict[str, Any], bool]] = [
        ("Objective", run.objective, True),
        ("Data", run.data, False),
        ("Summary", run.summary, False),
        ("Settings", run.settings, False),
        ("Versions", run.versions, False),
    ]
    tables = "".join(details(title, values, is_open=is_open) for title, values, is_open in parts)
    return f'<h2>How it was made</h2><div class="stack">{tables}</div>' if tables else ""
