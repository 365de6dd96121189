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


TABLES = {"tail": tail, "length": length, "flips": flips}
