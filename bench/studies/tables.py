"""A Markdown table per study. Every ± is a standard error over seeds."""

from __future__ import annotations

import statistics

from bench.lib.table import markdown
from bench.studies.records import Record, at_step, by_arm, last, paired, shown

SMOOTHED = 10  # steps


def smoothed(values: list[float]) -> list[float]:
    """Each step's mean with those before it, `SMOOTHED` in all where there are as many."""
    return [statistics.fmean(values[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(len(values))]


def gaps(exact: Record, other: Record) -> list[float]:
    """Difference of the losses of every step, as a share of the exact run's smoothed loss.

    Not of that step's loss alone, which is next to nothing where all of its pairs are learnt.
    """
    a, b = (record["curves"]["loss"] for record in (exact, other))
    return [abs(y - x) / mean for x, y, mean in zip(a, b, smoothed(a), strict=True)]


def tail_pairs(records: list[Record]) -> dict[str, dict[str, list[tuple[Record, Record]]]]:
    """By model ("logits x 2") and way ("mean"), the exact run and that way's of every seed."""
    arms = by_arm(records)
    models: dict[str, dict[str, list[tuple[Record, Record]]]] = {}
    for arm, runs in arms.items():
        way, _, model = arm.partition(", ")
        if way != "exact" and (pairs := paired(arms.get(f"exact, {model}", []), runs)):
            models.setdefault(model, {})[way] = pairs
    return models


def tail(records: list[Record]) -> str:
    """The largest of all seeds, but for active fractions and what is measured at the end."""
    rows = []
    for model, ways in tail_pairs(records).items():
        for way, pairs in ways.items():
            active = [
                a for _, run in pairs for a in run["curves"]["active_fraction"] if a is not None
            ]
            ends = [(last(exact), last(run)) for exact, run in pairs]
            rows.append(
                [
                    model,
                    way,
                    len(pairs),
                    f"{statistics.fmean(active):.2f}" if active else "–",
                    f"{max(statistics.median(gaps(*pair)) for pair in pairs):.2%}",
                    f"{max(max(smooth_gaps(*pair)) for pair in pairs):.2%}",
                    f"{max(max(gaps(*pair)) for pair in pairs):.2%}",
                    shown([exact["accuracy"] for exact, _ in ends]),
                    shown([run["accuracy"] - exact["accuracy"] for exact, run in ends], sign=True),
                    f"{max(abs(run['margin'] / exact['margin'] - 1) for exact, run in ends):.2%}",
                ]
            )
    head = (
        "model", "compared with exact", "seeds", "active fraction", "loss gap, median step",
        f"{SMOOTHED} steps' mean, largest", "single step, largest", "test accuracy, exact",
        "difference, same seed", "test margin, gap",
    )  # fmt: skip
    return markdown(head, rows, text=2)


def smooth_gaps(exact: Record, other: Record) -> list[float]:
    """Difference of the mean losses of ten steps, as a share of the exact run's."""
    one, two = (smoothed(record["curves"]["loss"]) for record in (exact, other))
    return [abs(b - a) / a for a, b in zip(one, two, strict=True)]


def length(records: list[Record]) -> str:
    arms = by_arm(records)
    rows = []
    for arm, runs in arms.items():
        for step in measured_steps(runs):
            measured = [at_step(run, step) for run in runs if has_step(run, step)]
            groups = ("chosen_longer", "rejected_longer")
            rows.append(
                [
                    arm,
                    step,
                    shown([m["accuracy"] for m in measured]),
                    *(shown([m["by_length"][g]["accuracy"] for m in measured]) for g in groups),
                    shown([m["correlation_with_length"] for m in measured], 2),
                    shown([m["answers"]["mean_tokens"] for m in measured], 0),
                    shown([m["answers"]["cut"] / m["answers"]["answers"] for m in measured], 2),
                ]
            )
    head = (
        "objective", "step", "test accuracy", "where chosen is longer", "where rejected is longer",
        "margin's correlation with length", "mean answer, tokens", "answers cut at the limit",
    )  # fmt: skip
    return markdown(head, rows) + "\n\n" + length_differences(arms)


def length_differences(arms: dict[str, list[Record]]) -> str:
    """Each arm less SimPO with the same seed, at the end."""
    rows = []
    for arm, runs in arms.items():
        if arm == "simpo" or not (pairs := paired(runs, arms.get("simpo", []))):
            continue
        ends = [(last(a), last(b)) for a, b in pairs]
        rows.append(
            [
                f"{arm} − simpo",
                len(pairs),
                shown([a["accuracy"] - b["accuracy"] for a, b in ends], sign=True),
                shown(
                    [a["answers"]["mean_tokens"] - b["answers"]["mean_tokens"] for a, b in ends],
                    1,
                    sign=True,
                ),
            ]
        )
    return markdown(
        ("at the end, same seed", "seeds", "test accuracy", "mean answer, tokens"), rows
    )


def flips(records: list[Record]) -> str:
    arms = by_arm(records)
    rows = []
    shares = dict.fromkeys(arm.partition(", ")[2] for arm in arms)
    for share in shares:
        simpo, gamma = (arms.get(f"{name}, {share}", []) for name in ("simpo", "gamma-simpo"))
        pairs = [(last(a), last(b)) for a, b in paired(simpo, gamma)]
        if pairs:
            rows.append(
                [
                    share,
                    len(pairs),
                    shown([a["accuracy"] for a, _ in pairs]),
                    shown([b["accuracy"] for _, b in pairs]),
                    shown([b["accuracy"] - a["accuracy"] for a, b in pairs], sign=True),
                    shown([a["margin"] for a, _ in pairs]),
                    shown([b["margin"] for _, b in pairs]),
                ]
            )
    head = (
        "labels", "seeds", "test accuracy, simpo", "gamma-simpo", "difference, same seed",
        "test margin (nats a token), simpo", "gamma-simpo",
    )  # fmt: skip
    return markdown(head, rows)


def trees(records: list[Record]) -> str:
    arms = by_arm(records)
    rows = []
    for arm, runs in arms.items():
        for step in measured_steps(runs):
            measured = [at_step(run, step) for run in runs if has_step(run, step)]
            rows.append([arm, step, *(shown([m[key] for m in measured]) for key in _HELD_OUT)])
    pairs = [(last(a), last(b)) for a, b in paired(*arms.values())] if len(arms) == 2 else []
    if pairs:
        both = [shown([b[key] - a[key] for a, b in pairs], sign=True) for key in _HELD_OUT]
        rows.append(["trees − shuffled pairs, same seed", "end", *both])
    head = ("order", "step", "test accuracy", "test loss", "test margin, nats a token")
    return markdown(head, rows)


_HELD_OUT = ("accuracy", "loss", "margin")


def real(records: list[Record]) -> str:
    """Each arm at its end, and less the one that it answers to, seed by seed."""
    arms = by_arm(records)
    start = next((run["measurements"][0] for run in records if run["seed"] == 0), None)
    rows = [_real_row("before training", [start])] if start else []
    rows += [_real_row(arm, [last(run) for run in runs]) for arm, runs in arms.items()]
    head = (
        "run", "seeds", "test accuracy", "test margin, nats a token", "chosen, nats a token",
        "mean answer, tokens", "answers cut", "4-grams repeated",
    )  # fmt: skip
    against = []
    for arm, other in REAL_AGAINST.items():
        if pairs := paired(arms.get(arm, []), arms.get(other, [])):
            ends = [(last(a), last(b)) for a, b in pairs]
            tokens = [a["answers"]["mean_tokens"] - b["answers"]["mean_tokens"] for a, b in ends]
            against.append(
                [
                    f"{arm} − {other}",
                    len(pairs),
                    shown([a["accuracy"] - b["accuracy"] for a, b in ends], sign=True),
                    shown([_chosen(a) - _chosen(b) for a, b in ends], sign=True),
                    shown(tokens, 1, sign=True),
                ]
            )
    signs = sum(bool(run["signs_of_collapse"]) for run in records)
    return "\n\n".join(
        [
            markdown(head, rows),
            markdown((
                "at the end, same seed", "seeds", "test accuracy", "chosen, nats a token",
                "mean answer, tokens",
            ), against),
            f"Runs that warned of a collapse: {signs} of {len(records)}.",
        ]
    )  # fmt: skip


REAL_AGAINST = {
    "lmpo": "simpo",
    "dpo": "simpo",
    "gamma-simpo": "simpo, β 10, 0% flipped",
    "gamma-simpo, β 10, 20% flipped": "simpo, β 10, 20% flipped",
    "gamma-simpo, β 10, 40% flipped": "simpo, β 10, 40% flipped",
    "simpo, exact tail": "simpo",
    "simpo, shuffled pairs": "simpo",
}
"""What each arm of `real` is compared with."""


def _real_row(arm: str, measured: list[Record]) -> list[object]:
    answers = [m["answers"] for m in measured]
    return [
        arm,
        len(measured),
        shown([m["accuracy"] for m in measured]),
        shown([m["margin"] for m in measured]),
        shown([_chosen(m) for m in measured], 2),
        shown([a["mean_tokens"] for a in answers], 0),
        shown([a["cut"] / a["answers"] for a in answers], 2),
        shown([a["repetition"] for a in answers], 2),
    ]


def _chosen(measurement: Record) -> float:
    return measurement["mean_logps"]["chosen"]


def measured_steps(runs: list[Record]) -> list[int]:
    return sorted({m["step"] for run in runs for m in run["measurements"]})


def has_step(run: Record, step: int) -> bool:
    return any(m["step"] == step for m in run["measurements"])


def provenance(records: list[Record]) -> str:
    """What the runs of a study ran on."""
    first = records[0]
    commits = ", ".join(dict.fromkeys(str(record["commit"])[:9] for record in records))
    minutes = sum(record["seconds"] for record in records) / 60
    return (
        f"{len(records)} runs of {first['steps']} steps, {first['pairs_per_step']} pairs each; "
        f"{first['train_pairs']:,} pairs to train on, {first['test_pairs']:,} to test; "
        f"torch {first['versions']['torch']}; {minutes:.0f} minutes in all; {commits}"
    )


TABLES = {"tail": tail, "length": length, "flips": flips, "trees": trees, "real": real}
