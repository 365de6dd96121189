"""The page of a comparison: several runs, or one setting under several seeds."""

from __future__ import annotations

from collections.abc import Sequence

from ..monitor.history import HEADLINE_METRICS, SAMPLED_TOKENS, Run
from ..text import figure
from .charts import ACCURACY, MARGIN, Chart, without_empty
from .groups import SEEDS, Group, differences, run_name
from .page import card, chart_card, details, page, ridges_card, section, text
from .ridges import REWARD_RIDGES, TARGET_RIDGES, Ridge, Ridges, remark_on
from .samples import compared_samples

METRICS = (
    ("rewards/accuracies", "Reward accuracy", ACCURACY),
    ("rewards/margins", "Reward margin", MARGIN),
    (
        "logps/chosen",
        "Log-prob, chosen",
        "nats per token; falling: probability leaves good answers",
    ),
    ("logps/rejected", "Log-prob, rejected", "nats per token"),
    ("loss", "Loss", "mean over pairs; of unequal objectives not to be compared"),
)
IN_TRAINING = (
    ("margin/mean", "Target margin", "what the objective asks of a pair, mean over pairs"),
    ("pairs_per_s", "Throughput", "pairs per second in training"),
    ("tokens_per_s", "Tokens", "tokens per second in training"),
    ("peak_memory_mib", "Memory", "MiB at peak, in training"),
    ("grad_norm", "Gradient norm", "before clipping"),
    (SAMPLED_TOKENS, "Lengths of their own answers", "tokens, mean over the sampled prompts"),
    ("lengths/chosen", "Length, chosen", "completion tokens per answer"),
    ("lengths/rejected", "Length, rejected", "completion tokens per answer"),
)
FROM_ZERO = ("pairs_per_s", "tokens_per_s", "peak_memory", "grad_norm", "lengths/", "samples/")


def comparison_headline(groups: Sequence[Group]) -> str:
    """Who ends where: "lmpo 0.97, simpo 0.95 held-out accuracy"."""
    runs = sum(len(group.runs) for group in groups)
    prefix = common_prefix(groups)
    ends = [(group, group.last(prefix + "rewards/accuracies")) for group in groups]
    if not all(values for _, values in ends):
        return f"{len(groups)} settings, {runs} runs"
    where = "Held-out" if prefix else "Training"
    means = [(group.label, sum(values) / len(values)) for group, values in ends]
    if len(groups) == 1:
        return f"{where} accuracy {means[0][1]:.2f} over {runs} seeds"
    means = sorted(means, key=lambda each: -each[1])
    if len(groups) > 3:
        ends = f"{means[-1][1]:.2f} to {means[0][1]:.2f}"
        return f"{len(groups)} settings: {where.lower()} accuracy {ends}"
    listed = ", ".join(f"{label} {value:.2f}" for label, value in means)
    return f"{where} accuracy: {listed}"


def common_prefix(groups: Sequence[Group]) -> str:
    """`eval_` if every run was evaluated on held-out pairs, else nothing."""
    return "eval_" if all(run.prefix() for group in groups for run in group.runs) else ""


def comparison_charts(groups: Sequence[Group]) -> list[Chart]:
    """One metric a chart, one line a group; held-out where all runs have that."""
    prefix, charts = common_prefix(groups), []
    for key, title, note in METRICS:
        if prefix:
            lines = [group.line(prefix + key, "dotted") for group in groups]
            note += ", held-out pairs"
        else:
            lines = [group.line(key) for group in groups]
        bounds = (0.0, 1.0, 0.5) if key == "rewards/accuracies" else (None, None, None)
        charts.append(Chart(title, note, lines, *bounds))
    for key, title, note in IN_TRAINING:
        low = 0.0 if key.startswith(FROM_ZERO) else None
        charts.append(Chart(title, note, [group.line(key) for group in groups], low))
    return [chart for chart in map(without_empty, charts) if chart.lines]


def comparison_ridges(groups: Sequence[Group]) -> list[Ridges]:
    """Margins over pairs at the end, a ridge for each group."""
    kinds = (
        ("reward_margins", "Reward margins over pairs", REWARD_RIDGES, "above zero"),
        ("target_margins", "Target margins over pairs", TARGET_RIDGES, "median"),
    )
    found = []
    for kind, title, note, remark in kinds:
        last = [(group, group.final_margins(kind)) for group in groups]
        ridges = [Ridge(g.label, g.colour, h, remark_on(h, remark)) for g, h in last if h]
        if any(ridge.histogram.spread for ridge in ridges):
            found.append(Ridges(title, note, ridges, named=False))
    return found


def render_comparison(groups: Sequence[Group]) -> str:
    """The whole page."""
    runs = [run for group in groups for run in group.runs]
    title, last_step = comparison_headline(groups), max(run.last_step() for run in runs)
    seeds = "" if len(runs) == len(groups) else "lines are means over seeds, bands their range"
    kicker = " · ".join(p for p in (_count(groups, runs), seeds) if p)
    top = f'<p class="kicker">{text(kicker)}</p><h1>{text(title)}</h1>'
    charts = [chart_card(chart, last_step) for chart in comparison_charts(groups)]
    ridges = [ridges_card(chart) for chart in comparison_ridges(groups)]
    where = "Held-out pairs" if common_prefix(groups) else "Training pairs"
    body = [f"<header>{top}</header>"]
    body += section(f"{where}, at the end", [_results(groups)])
    body += section("Settings that differ", [_differences_table(groups)])
    body += section("Over the steps of training", charts)
    body += section("Margins at the end, pair by pair", ridges)
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
    """Final values by metric, one column for each group."""
    prefix = common_prefix(groups)
    keys = [(prefix + key, label) for key, label in HEADLINE_METRICS]
    keys += [("pairs_per_s", "pairs per second"), ("peak_memory_mib", "MiB at peak")]
    rows = []
    for key, label in keys:
        values = [group.last(key) for group in groups]
        if key == "pairs_per_s":
            rates = [[run.pairs_per_s() for run in group.runs] for group in groups]
            values = [[rate for rate in each if rate is not None] for each in rates]
        if any(value for each in values for value in each):
            rows.append((label, [range_of(each) for each in values]))
    return rows


def _results(groups: Sequence[Group]) -> str:
    return _table(groups, results_rows(groups)) if results_rows(groups) else ""


def _table(groups: Sequence[Group], rows: Sequence[tuple[str, list[str]]]) -> str:
    marks = "".join(
        f'<th class="n"><span class="{group.colour}"><i class="mark"></i></span>'
        f"{text(group.label)}</th>"
        for group in groups
    )
    filled = "".join(
        f"<tr><th>{text(label)}</th>" + "".join(f'<td class="n">{text(v)}</td>' for v in values)
        for label, values in rows
    )
    table = f"<table><thead><tr><th></th>{marks}</tr></thead><tbody>{filled}</tbody></table>"
    return card(table, "scroll wide")


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
            if counts := run.not_finite():
                listed = ", ".join(f"{key} ({count})" for key, count in counts.items())
                remarks.append(f"{run_name(run)}: not finite in the logs, left out above: {listed}")
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
