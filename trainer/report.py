"""A run as one self-contained HTML page, and as a few lines for the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .errors import refusals
from .report_charts import run_charts
from .report_page import (
    changes_table,
    chart_card,
    details,
    figure,
    page,
    sample_card,
    text,
)
from .report_run import Run, load_run


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of the run in `run_dir`, to `run_dir/report.html` unless told otherwise."""
    run = load_run(Path(run_dir))
    out = Path(run_dir) / "report.html" if out is None else Path(out)
    with refusals(f"report {out}: cannot be written", OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(run), encoding="utf-8")
    return out


def summary_lines(run_dir: Path) -> list[str]:
    """The headline and a table of the main numbers, before and after, as plain text."""
    run = load_run(Path(run_dir))
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


def duration(seconds: float) -> str:
    """Seconds as a reader says them: 8.4 s, 150 s, 12 min, 3 h 20 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 179.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def render(run: Run) -> str:
    """The whole page."""
    title = headline(run)
    body = [_header(run, title)]
    charts = [chart_card(chart, run.last_step()) for chart in run_charts(run)]
    if changes := run.changes():
        where = "Held-out pairs" if run.prefix() else "Training pairs"
        beside, charts = charts[:1], charts[1:]
        body += _section(where, [changes_table(changes, *_column_names(run)), *beside])
    body += _section(
        "Answers to held-out prompts", [sample_card(s) for s in run.samples], small=True
    )
    body += _section("Over the steps of training", charts)
    body += [_note(run), _how(run)]
    return page(f"{title} · {_name(run)}", [part for part in body if part])


def _section(title: str, cards: list[str], *, small: bool = False) -> list[str]:
    """A heading and a grid of the cards that hold something."""
    filled = "".join(cards)
    grid = "grid small" if small else "grid"
    return [f'<h2>{title}</h2><div class="{grid}">{filled}</div>'] if filled else []


def _header(run: Run, title: str) -> str:
    when = str(run.started)[:16].replace("T", " ") if run.started else ""
    kicker = " · ".join(text(part) for part in (_name(run), when) if part)
    facts = [
        run.objective.get("name") or run.settings.get("objective"),
        run.settings.get("model_name_or_path"),
        run.settings.get("dataset") or run.settings.get("dataset_mixer"),
        run.device,
        *(f"{value} {name}" for name, value in _speed(run)),
    ]
    lead = " · ".join(text(value) for value in facts if value)
    top = f'<p class="kicker">{kicker}</p><h1>{text(title)}</h1><p class="lead">{lead}</p>'
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
        ("Data", run.data, True),
        ("Summary", run.summary, False),
        ("Settings", run.settings, False),
        ("Versions", run.versions, False),
    ]
    tables = "".join(details(title, values, is_open=is_open) for title, values, is_open in parts)
    return f'<h2>How it was made</h2><div class="stack">{tables}</div>' if tables else ""
