"""One run: its charts, its page, and its few lines for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..monitor.collapse import SAMPLED_TOKENS, Watch
from ..monitor.history import Run, number
from ..text import duration, figure, unplaced
from .charts import ACCURACY, MARGIN, Chart, Line, draw_chart, filled
from .groups import COLOURS
from .marks import Drawing
from .page import details, drawing_card, not_finite, numbers_table, page, sample_card, section, text
from .ridges import KINDS, draw_ridges, over_steps
from .samples import sample_strips


def run_headline(run: Run) -> str:
    """One sentence from the numbers: "Held-out accuracy 0.51 → 0.97 in 61 s"."""
    where = "Held-out" if run.prefix() else "Training"
    took = "" if (seconds := run.seconds()) is None else f" in {duration(seconds)}"
    changes = {change.label: change for change in run.changes()}
    name = next(iter(run.held_out().values()), "")
    for label in ("accuracy", "reward margin", "loss"):
        if change := changes.get(label + name):
            as_text = "{:.2f}".format if label == "accuracy" else figure
            before = "" if change.before is None else f"{as_text(change.before)} → "
            return f"{where} {change.label} {before}{as_text(change.after)}{took}"
    return f"Trained {run.last_step():g} steps{took}"


def run_lines(run: Run) -> list[str]:
    """The headline and a table of the main numbers, before and after."""
    changes = run.changes()
    width = max((len(change.label) for change in changes), default=0)
    first, last = _column_names(run)
    lines = [run_headline(run)]
    if changes:
        lines += ["", f"{'':{width}}  {first:>10}  {last:>10}"]
    else:
        lines.append("Set logging_steps: 1 to see losses and accuracies; this run logged no step")
    for change in changes:
        before = "" if change.before is None else figure(change.before)
        lines.append(f"{change.label:{width}}  {before:>10}  {figure(change.after):>10}")
    return [*lines, ", ".join(speed)] if (speed := _speed(run)) else lines


def render_run(run: Run) -> str:
    """The page as HTML."""
    title = run_headline(run)
    body = [_header(run, title)]
    lines, ridges = run_drawings(run)
    charts = [drawing_card(drawing) for drawing in lines]
    if table := _changes_table(run):
        where = "Held-out pairs" if run.prefix() else "Training pairs"
        first, charts = charts[:1], charts[1:]
        body += section(where, [table, *first])
    body += section(
        "Answers to held-out prompts", [sample_card(s) for s in run.samples], small=True
    )
    body += section("Over the steps of training", charts)
    body += section("Margins, pair by pair", map(drawing_card, ridges))
    if run.step_samples:
        body += ["<h2>Answers over the steps of training</h2>", sample_strips(run)]
    body += [_note(run), _how(run)]
    return page(f"{title} · {run.name}", [part for part in body if part])


def run_drawings(run: Run) -> tuple[list[Drawing], list[Drawing]]:
    """Metrics over the steps of training, and margins over held-out pairs at each evaluation."""
    lines = [draw_chart(chart, run.last_step()) for chart in _charts(run)]
    ridges = []
    for name, kind in KINDS.items():
        by_step = run.margins.get(name, {})
        if by_step and (name == "reward_margins" or any(h.spread for h in by_step.values())):
            ridges.append(draw_ridges(kind, over_steps(by_step)))
    return lines, ridges


def _header(run: Run, title: str) -> str:
    when = str(run.started)[:16].replace("T", " ") if run.started else ""
    kicker = " · ".join(text(part) for part in (run.name, when) if part)
    facts = [
        run.objective.get("name") or run.settings.get("objective"),
        unplaced(run.settings.get("model_name_or_path")),
        unplaced(run.settings.get("dataset") or run.settings.get("dataset_mixer")),
        run.device,
        *_speed(run),
    ]
    lead = "".join(f"<li>{text(value)}</li>" for value in facts if value)
    top = f'<p class="kicker">{kicker}</p><h1>{text(title)}</h1><ul class="lead">{lead}</ul>'
    return f"<header>{top}</header>"


def _changes_table(run: Run) -> str:
    """Metrics before and after; the first column of numbers goes when nothing has a before."""
    changes, heads = run.changes(), _column_names(run)
    if not changes:
        return ""
    rows = []
    for change in changes:
        before = "" if change.before is None else figure(change.before)
        rows.append((change.label, [before, f"<b>{figure(change.after)}</b>"]))
    if all(change.before is None for change in changes):
        heads, rows = heads[1:], [(label, cells[1:]) for label, cells in rows]
    return numbers_table(map(text, heads), rows)


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


def _speed(run: Run) -> list[str]:
    facts = []
    if (pairs_per_s := run.pairs_per_s()) is not None:
        facts.append(f"{figure(pairs_per_s)} pairs per second")
    memory = run.finite("peak_memory_mib")
    if memory and max(memory) > 0:
        facts.append(f"{figure(max(memory))} MiB at peak")
    if shares := run.finite("tokens/computed_vs_padded"):
        facts.append(f"{sum(shares) / len(shares):.2f} of padded tokens computed")
    if mfu := run.finite("mfu"):
        facts.append(f"{figure(mfu[-1])} MFU")
    return facts


def _note(run: Run) -> str:
    """Signs of a collapse, and where values were not finite: charts leave a gap there."""
    watch = Watch()
    for entry in sorted(run.history, key=lambda entry: number(entry.get("step")) or 0.0):
        watch.add(entry)
    notes = [f"Signs of a collapse, {sign}." for sign in watch.signs.values()]
    if run.not_finite():
        notes.append(f"Not finite in the logs, left out above: {not_finite(run)}.")
    return "".join(f'<p class="note">{text(note)}</p>' for note in notes)


def _how(run: Run) -> str:
    """Folding tables of everything it takes to run this again."""
    parts = {"Objective": run.objective, "Data": run.data, "Summary": run.summary}
    parts |= {"Settings": run.settings, "Versions": run.versions}
    tables = "".join(details(each, parts[each], is_open=each == "Objective") for each in parts)
    return f'<h2>How it was made</h2><div class="stack">{tables}</div>' if tables else ""


def _charts(run: Run) -> list[Chart]:
    """The charts that a run's logs can fill, most telling first."""
    held_out = run.held_out()

    def both(key: str) -> list[Line]:
        lines = [Line("training", "muted", run.series(key))]
        for place, (prefix, name) in enumerate(held_out.items()):
            colour = f"c{place % COLOURS}" if name else "accent"
            lines.append(Line(f"held-out{name}", colour, run.series(prefix + key), "dotted"))
        return lines

    def sides(key: str, suffix: str = "") -> list[Line]:
        lines = []
        for side in ("chosen", "rejected"):
            name = f"{key}/{side}{suffix}"
            lines.append(Line(side, side, run.series(name)))
            for prefix, of_set in [*held_out.items()][:1]:  # dots of several would look the same
                label = f"{side}, held-out{of_set}"
                lines.append(Line(label, side, run.series(prefix + name), "dots"))
        return lines

    def training(key: str, label: str = "training") -> list[Line]:
        return [Line(label, "accent", run.series(key))]

    asked = "what the objective asks of a pair, mean ± standard deviation"
    charts = [
        Chart("Reward accuracy", ACCURACY, both("rewards/accuracies"), 0.0, 1.0, 0.5),
        Chart("Reward margin", MARGIN, both("rewards/margins")),
        _log_probs(run, sides),
        Chart("Loss", "mean over pairs", both("loss")),
        Chart("Target margin", asked, [_with_std(run)]),
        Chart("Lengths of the pairs", "completion tokens per answer", sides("lengths"), low=0.0),
        Chart(
            "Lengths of sampled answers",
            "tokens, mean over the sampled prompts",
            [Line("sampled", "accent", run.series(SAMPLED_TOKENS), "dotted")],
            low=0.0,
        ),
        Chart(
            "Throughput",
            "pairs per second in training",
            training("pairs_per_s", "pairs per second"),
            low=0.0,
        ),
        Chart("Gradient norm", "before clipping", training("grad_norm"), low=0.0),
        Chart("Learning rate", "", training("learning_rate"), low=0.0),
    ]
    return filled(charts)


def _log_probs(run: Run, sides: Callable[..., list[Line]]) -> Chart:
    """Means over tokens; of trainers that log none, such as TRL's, what they call ``logps``."""
    keys = (f"{prefix}logps/chosen_mean" for prefix in ("", *run.held_out()))
    if any(map(run.finite, keys)):
        return Chart("Log-probabilities", _mass_note(run), sides("logps", "_mean"))
    note = "nats, mean over pairs; sums over an answer's tokens, or what the trainer compares"
    return Chart("Log-probabilities", note, sides("logps"))


def _mass_note(run: Run) -> str:
    """Where chosen and rejected log-probs went: margins may grow while both become unlikely."""
    note = "nats per token, mean over pairs"
    moves = []
    for side in ("chosen", "rejected"):
        values = run.finite(f"{run.prefix()}logps/{side}_mean")
        if len(values) < 2:
            return note
        moves.append(values[-1] - values[0])
    chosen, rejected = moves
    said = [
        f"{side} {'rose' if move > 0 else 'fell'} by {abs(move):.2g}"
        for side, move in (("chosen", chosen), ("rejected", rejected))
    ]
    verdict = ": probability leaves both answers" if chosen < -0.01 and rejected < 0 else ""
    return f"{note}; {', '.join(said)}{verdict}"


def _with_std(run: Run) -> Line:
    widths = dict(run.series("margin/std"))
    means = run.series("margin/mean")
    around = [(s, v, w if math.isfinite(w := widths.get(s, 0.0)) else 0.0) for s, v in means]
    low, high = [(s, v - w) for s, v, w in around], [(s, v + w) for s, v, w in around]
    return Line("mean ± std", "accent", means, low=low, high=high)
