"""Several runs, or one setting under several seeds: charts, page, and lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from ..monitor.collapse import SAMPLED_TOKENS
from ..monitor.history import HEADLINE_METRICS, Run
from ..text import figure
from .charts import ACCURACY, MARGIN, Chart, draw_chart, filled
from .groups import SEEDS, Group, differences, run_name
from .marks import Drawing
from .page import details, drawing_card, not_finite, numbers_table, page, section, text
from .ridges import KINDS, Ridge, draw_ridges
from .samples import compared_samples

METRICS = {
    "rewards/accuracies": Chart("Reward accuracy", ACCURACY, [], 0.0, 1.0, 0.5),
    "rewards/margins": Chart("Reward margin", MARGIN),
    "logps/chosen_mean": Chart(
        "Log-prob, chosen", "nats per token; falling: probability leaves good answers"
    ),
    "logps/rejected_mean": Chart("Log-prob, rejected", "nats per token"),
    "loss": Chart("Loss", "mean over pairs; of unequal objectives not to be compared"),
}
"""Of held-out pairs where every run has them."""

IN_TRAINING = {
    "margin/mean": Chart("Target margin", "what the objective asks of a pair, mean over pairs"),
    "pairs_per_s": Chart("Throughput", "pairs per second in training", low=0.0),
    "tokens_per_s": Chart("Tokens", "tokens per second in training", low=0.0),
    "peak_memory_mib": Chart("Memory", "MiB at peak, in training", low=0.0),
    "grad_norm": Chart("Gradient norm", "before clipping", low=0.0),
    SAMPLED_TOKENS: Chart(
        "Lengths of sampled answers", "tokens, mean over the sampled prompts", low=0.0
    ),
    "lengths/chosen": Chart("Length, chosen", "completion tokens per answer", low=0.0),
    "lengths/rejected": Chart("Length, rejected", "completion tokens per answer", low=0.0),
}


def comparison_headline(groups: Sequence[Group]) -> str:
    """Who ends where: "lmpo 0.97, simpo 0.95 held-out accuracy"."""
    runs = sum(len(group.runs) for group in groups)
    prefix, name = next(iter(common_sets(groups).items()))
    ends = [(group, group.last(prefix + "rewards/accuracies")) for group in groups]
    if not all(values for _, values in ends):
        return f"{len(groups)} settings, {runs} runs"
    where = "Held-out" if prefix else "Training"
    means = [(group.label, sum(values) / len(values)) for group, values in ends]
    if len(groups) == 1:
        return f"{where} accuracy{name} {means[0][1]:.2f} over {runs} seeds"
    means = sorted(means, key=lambda each: -each[1])
    if len(groups) > 3:
        ends = f"{means[-1][1]:.2f} to {means[0][1]:.2f}"
        return f"{len(groups)} settings: {where.lower()} accuracy{name} {ends}"
    listed = ", ".join(f"{label} {value:.2f}" for label, value in means)
    return f"{where} accuracy{name}: {listed}"


def common_sets(groups: Sequence[Group]) -> dict[str, str]:
    """Of `Run.held_out`, what every run was evaluated on; training pairs if there is nothing."""
    first, *others = [run.held_out() for group in groups for run in group.runs]
    common = {key: name for key, name in first.items() if all(key in each for each in others)}
    return common or {"": ""}


def comparison_drawings(groups: Sequence[Group]) -> tuple[list[Drawing], list[Drawing]]:
    """Metrics over the steps of training, and margins over pairs at the end; a line a group."""
    charts = []
    for (key, chart), (prefix, name) in product(METRICS.items(), common_sets(groups).items()):
        lines = [group.line(prefix + key, "dotted" if prefix else "line") for group in groups]
        note = f"{chart.note}, held-out pairs{name}" if prefix else chart.note
        charts.append(replace(chart, note=note, lines=lines))
    for key, chart in IN_TRAINING.items():
        charts.append(replace(chart, lines=[group.line(key) for group in groups]))
    last_step = max(run.last_step() for group in groups for run in group.runs)
    drawings = [draw_chart(chart, last_step) for chart in filled(charts)]
    margins = []
    for name, kind in KINDS.items():
        last = [(group, group.final_margins(name)) for group in groups]
        ridges = [Ridge(group.label, group.colour, pairs) for group, pairs in last if pairs]
        if any(ridge.histogram.spread for ridge in ridges):
            margins.append(draw_ridges(kind, ridges, named=False))
    return drawings, margins


def comparison_lines(groups: Sequence[Group]) -> list[str]:
    """The headline and a table of the main numbers, by group."""
    rows = [("", [group.label for group in groups]), *results_rows(groups)]
    columns = list(zip(*([label, *values] for label, values in rows), strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [comparison_headline(groups), ""]
    for label, values in rows:
        cells = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([f"{label:{widths[0]}}", *cells]))
    return lines


def render_comparison(groups: Sequence[Group]) -> str:
    """The page as HTML."""
    runs = [run for group in groups for run in group.runs]
    title = comparison_headline(groups)
    seeds = "" if len(runs) == len(groups) else "lines are means over seeds, bands their range"
    kicker = " · ".join(p for p in (_count(groups, runs), seeds) if p)
    top = f'<p class="kicker">{text(kicker)}</p><h1>{text(title)}</h1>'
    charts, ridges = comparison_drawings(groups)
    where = "Training pairs" if "" in common_sets(groups) else "Held-out pairs"
    body = [f"<header>{top}</header>"]
    body += section(f"{where}, at the end", [_results(groups)])
    body += section("Settings that differ", [_differences_table(groups)])
    body += section("Over the steps of training", map(drawing_card, charts))
    body += section("Margins at the end, pair by pair", map(drawing_card, ridges))
    if samples := compared_samples(groups):
        body += ["<h2>Answers to the same prompts</h2>", samples]
    body += [_notes(groups), _runs(groups)]
    return page(f"{title} · {_count(groups, runs)}", [part for part in body if part])


def _count(groups: Sequence[Group], runs: Sequence[Run]) -> str:
    settings = f"{len(groups)} setting{'s' if len(groups) > 1 else ''}"
    return f"{settings}, {len(runs)} runs" if len(runs) > len(groups) else settings


def range_of(values: Sequence[float]) -> str:
    """A mean, and the range in brackets where there are several values."""
    if not values:
        return ""
    mean = figure(sum(values) / len(values))
    low, high = figure(min(values)), figure(max(values))
    return mean if low == high else f"{mean} ({low} to {high})"


def results_rows(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Final values by metric, one column for each group; their step where runs end apart."""
    sets = common_sets(groups).items()
    keys = [
        (prefix + key, label + name)
        for (key, label), (prefix, name) in product(HEADLINE_METRICS, sets)
    ]
    keys += [("pairs_per_s", "pairs per second"), ("peak_memory_mib", "MiB at peak")]
    rows = []
    for key, label in keys:
        values = [group.last(key) for group in groups]
        if key == "pairs_per_s":
            rates = [[run.pairs_per_s() for run in group.runs] for group in groups]
            values = [[rate for rate in each if rate is not None] for each in rates]
        if any(value for each in values for value in each):
            rows.append((label, [range_of(each) for each in values]))
    ends = [[run.last_step() for run in group.runs] for group in groups]
    if rows and len({step for each in ends for step in each}) > 1:
        rows.insert(0, ("last step", [range_of(each) for each in ends]))
    return rows


def _results(groups: Sequence[Group]) -> str:
    return _table(groups, results_rows(groups)) if results_rows(groups) else ""


def _table(groups: Sequence[Group], rows: Sequence[tuple[str, list[str]]]) -> str:
    heads = [
        f'<span class="{group.colour}"><i class="mark"></i></span>{text(group.label)}'
        for group in groups
    ]
    return numbers_table(heads, [(label, map(text, cells)) for label, cells in rows], "wide")


def _differences_table(groups: Sequence[Group]) -> str:
    rows = []
    for name, values in differences([group.runs for group in groups]).items():
        missing = "–" if name.startswith("objective.") else "default"
        rows.append((name, [_plain(value, missing) for value in values]))
    for name in SEEDS:
        seeds = [[run.settings.get(name) for run in group.runs] for group in groups]
        if any(len(each) > 1 and len(set(map(str, each))) > 1 for each in seeds):
            listed = [", ".join(_plain(seed, "default") for seed in each) for each in seeds]
            rows.append((name, listed))
    return _table(groups, rows) if rows else ""


def _plain(value: object, missing: str) -> str:
    if value is None:
        return missing
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _notes(groups: Sequence[Group]) -> str:
    remarks = [
        f"{group.label}: the runs end at different steps, and means are over those that got there"
        for group in groups
        if group.uneven()
    ]
    for group in groups:
        for run in group.runs:
            if run.not_finite():
                keys = not_finite(run)
                remarks.append(f"{run_name(run)}: not finite in the logs, left out above: {keys}")
    return "".join(f'<p class="note">{text(remark)}.</p>' for remark in remarks)


def _runs(groups: Sequence[Group]) -> str:
    """A folding table for each run, with what it takes to run it again."""
    tables = []
    for group in groups:
        for run in group.runs:
            facts = {"folder": str(run.folder), "objective": run.objective}
            facts |= {"settings": run.settings, "data": run.data, "versions": run.versions}
            several = f", seed {run.settings.get('seed', 'default')}" if len(group.runs) > 1 else ""
            tables.append(details(f"{group.label}{several}: {run_name(run)}", facts))
    return f'<h2>How they were made</h2><div class="stack">{"".join(tables)}</div>'
