"""A picture per study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.lib.plots import new_figure, save
from bench.studies.records import Record, by_arm, last, mean_and_error
from bench.studies.tables import SMOOTHED, smooth_gaps, smoothed, tail_pairs

DARK, MIDDLE, LIGHT, OTHER, GREY = "#084594", "#4292c6", "#9ecae1", "#e6550d", "#999999"
SMALLEST = 1e-7
"""Differences below it are drawn there."""


def tail(records: list[Record], path: Path) -> None:
    """Losses of the exact runs under those of one bound, and how far apart every bound's are."""
    models = tail_pairs(records)
    figure, axes = new_figure(2, len(models), 5.5, sharex=True)
    ways = dict.fromkeys(way for pairs_by_way in models.values() for way in pairs_by_way)
    colours = dict(zip(ways, (DARK, MIDDLE, LIGHT, GREY), strict=False))
    steps = range(1, records[0]["steps"] + 1)
    for column, (name, pairs_by_way) in enumerate(models.items()):
        top, bottom = axes[0][column], axes[1][column]
        for i, pair in enumerate(pairs_by_way[next(iter(ways))]):
            for run, width, colour in zip(pair, (3.5, 0.8), (LIGHT, DARK), strict=True):
                label = None if i else run["arm"].partition(", ")[0]
                losses = smoothed(run["curves"]["loss"])
                top.plot(steps, losses, linewidth=width, color=colour, label=label)
        for way, pairs in pairs_by_way.items():
            seeds = zip(*(smooth_gaps(*pair) for pair in pairs), strict=True)
            largest = [max(SMALLEST, *each) for each in seeds]
            bottom.plot(steps, largest, linewidth=1.2, color=colours[way], label=way)
        bottom.axhline(0.01, color=OTHER, linewidth=1)
        bottom.set(yscale="log", xlabel="step", ylim=(SMALLEST, 10))
        top.set_title(name.replace(", ", ",\n"))
    axes[0][0].set_ylabel(f"loss, mean of {SMOOTHED} steps")
    axes[1][0].set_ylabel("largest difference; line: 1%")
    axes[0][0].legend(fontsize=7)
    axes[1][0].legend(loc="upper left", fontsize=7)
    save(figure, path)


def length(records: list[Record], path: Path) -> None:
    """Accuracy and length of answers, from the common start to each seed's end."""
    figure, axes = new_figure(1, 2, 3.6)
    arms = by_arm(records)
    colours: dict[str, str] = dict(zip(arms, (OTHER, DARK, LIGHT), strict=False))
    for arm, runs in arms.items():
        start = next((run["measurements"][0] for run in runs if run["seed"] == 0), None)
        for run in runs:
            points = [m for m in ([start] if start else []) + run["measurements"] if m]
            points = [m for i, m in enumerate(points) if i == 0 or m["step"] > 0]
            axes[0][0].plot(
                [m["answers"]["mean_tokens"] for m in points],
                [m["accuracy"] for m in points],
                color=colours[arm], alpha=0.5, linewidth=1, marker=".",
            )  # fmt: skip
        axes[0][0].scatter(
            [last(run)["answers"]["mean_tokens"] for run in runs],
            [last(run)["accuracy"] for run in runs],
            color=colours[arm], s=40, zorder=3, label=arm,
        )  # fmt: skip
    axes[0][0].set(xlabel="mean tokens of sampled answers", ylabel="test accuracy")
    axes[0][0].set_title("From the common start to the end of each seed (large dots)")
    axes[0][0].legend()
    _length_groups(axes[0][1], arms, colours)
    save(figure, path)


def _length_groups(panel: Any, arms: dict[str, list[Record]], colours: dict[str, str]) -> None:
    groups = {"chosen is longer": "chosen_longer", "rejected is longer": "rejected_longer"}
    for i, (arm, runs) in enumerate(arms.items()):
        for j, key in enumerate(groups.values()):
            mean, error = mean_and_error([last(run)["by_length"][key]["accuracy"] for run in runs])
            place = j + 0.25 * (i - (len(arms) - 1) / 2)
            panel.bar(place, mean, 0.22, yerr=error, color=colours[arm], label=None if j else arm)
    panel.axhline(0.5, color="black", linewidth=0.6)
    panel.set_xticks(range(len(groups)), groups)
    panel.set_ylabel("test accuracy at the end")
    panel.set_title("Where the better answer is the longer one, and where not")
    panel.legend()


def flips(records: list[Record], path: Path) -> None:
    """Accuracy on unflipped test pairs against the share of flipped training labels."""
    figure, axes = new_figure(1, 2, 3.6)
    arms = by_arm(records)
    for objective, colour, aside in (("simpo", OTHER, -0.004), ("gamma-simpo", DARK, 0.004)):
        shares, runs_by_share = [], []
        for arm, runs in arms.items():
            if arm.startswith(f"{objective}, "):
                shares.append(float(runs[0]["settings"]["flip"]) + aside)
                runs_by_share.append(runs)
        for panel, key in zip(axes[0], ("accuracy", "margin"), strict=True):
            stats = [mean_and_error([last(run)[key] for run in runs]) for runs in runs_by_share]
            panel.errorbar(
                shares, [mean for mean, _ in stats], yerr=[error or 0 for _, error in stats],
                color=colour, marker="o", capsize=3, label=objective,
            )  # fmt: skip
            for share, runs in zip(shares, runs_by_share, strict=True):
                each = [last(run)[key] for run in runs]
                panel.scatter([share] * len(each), each, color=colour, s=8, alpha=0.6)
    for panel, text in zip(axes[0], ("test accuracy", "test margin, nats a token"), strict=True):
        panel.set(xlabel="share of training labels flipped", ylabel=text)
        panel.set_xticks((0, 0.2, 0.4), ("0%", "20%", "40%"))
        panel.legend()
    axes[0][0].set_title("Accuracy on clean test pairs; bars: standard error")
    axes[0][1].set_title("Margin on clean test pairs")
    save(figure, path)


def trees(records: list[Record], path: Path) -> None:
    """Loss of each step, and held-out accuracy at the end, by the order of pairs."""
    figure, axes = new_figure(1, 2, 3.6)
    for (arm, runs), colour in zip(by_arm(records).items(), (OTHER, DARK), strict=False):
        for i, run in enumerate(runs):
            losses = smoothed(run["curves"]["loss"])
            label = None if i else arm
            axes[0][0].plot(
                range(1, len(losses) + 1), losses, linewidth=1, color=colour, label=label
            )
            points = [m for m in run["measurements"] if m["step"]]
            accuracies = [m["accuracy"] for m in points]
            steps = [m["step"] for m in points]
            axes[0][1].plot(steps, accuracies, marker=".", color=colour, label=label)
    axes[0][0].set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHED} steps")
    axes[0][1].set(xlabel="step", ylabel="test accuracy")
    for panel in axes[0]:
        panel.legend()
    save(figure, path)


def real(records: list[Record], path: Path) -> None:
    """Held-out accuracy and the length of sampled answers at the end of every run."""
    figure, axes = new_figure(1, 2, 4.4, sharey=True)
    arms = by_arm(records)
    start = next((run["measurements"][0] for run in records if run["seed"] == 0), None)
    measures = {
        "test accuracy": lambda m: m["accuracy"],
        "mean tokens of sampled answers": lambda m: m["answers"]["mean_tokens"],
    }
    for panel, (name, value) in zip(axes[0], measures.items(), strict=True):
        for place, runs in enumerate(arms.values()):
            each = [value(last(run)) for run in runs]
            mean, error = mean_and_error(each)
            panel.errorbar(mean, place, xerr=error or 0, marker="o", color=DARK, capsize=3)
            panel.scatter(each, [place] * len(each), color=DARK, s=8, alpha=0.6)
        if start:
            panel.axvline(value(start), color=GREY, linewidth=1)
        panel.set(xlabel=name)
        panel.set_title("line: before training")
    axes[0][0].set_yticks(range(len(arms)), list(arms))
    axes[0][0].invert_yaxis()
    save(figure, path)


PICTURES = {"tail": tail, "length": length, "flips": flips, "trees": trees, "real": real}
