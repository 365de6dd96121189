"""Runs side by side: which of them are one setting under several seeds, and how settings differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..monitor.history import Run, flatten
from ..monitor.margins import Histogram
from .charts import Line, Style

SEEDS = ("seed", "data_seed", "mix_seed")
NOT_COMPARED = {
    *SEEDS,
    *("output_dir", "run_name", "logging_dir", "report_to", "resume_from_checkpoint"),
    *("push_to_hub", "hub_model_id", "write_report", "disable_tqdm", "profile"),
    *("logging_steps", "logging_strategy", "logging_first_step"),
    *("save_steps", "save_strategy", "save_total_limit"),
}
"""Settings that do not tell runs apart: seeds, and where and how often a run writes."""

COLOURS = 8
LABEL_LENGTH = 40


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone."""

    label: str
    colour: str
    runs: list[Run]

    def line(self, key: str, style: Style = "line") -> Line:
        """The mean over runs of a metric by step; the band is from the least to the greatest."""
        by_step: dict[float, list[float]] = {}
        for run in self.runs:
            for step, value in run.series(key):
                by_step.setdefault(step, []).append(value)
        kept = {step: [v for v in by_step[step] if math.isfinite(v)] for step in sorted(by_step)}
        points = [(step, _mean(values)) for step, values in kept.items()]
        if len(self.runs) == 1:
            return Line(self.label, self.colour, points, style)
        low = [(step, min(values, default=math.nan)) for step, values in kept.items()]
        high = [(step, max(values, default=math.nan)) for step, values in kept.items()]
        return Line(self.label, self.colour, points, style, low, high)

    def last(self, key: str) -> list[float]:
        """The last finite value of a metric in each run that has one."""
        series = [run.finite(key) for run in self.runs]
        return [values[-1] for values in series if values]

    def final_margins(self, kind: str) -> Histogram | None:
        """Margins at each run's last evaluation, all runs' pairs together."""
        last = [list(run.margins[kind].values())[-1] for run in self.runs if run.margins.get(kind)]
        return sum(last[1:], last[0]) if last else None

    def uneven(self) -> bool:
        """Whether the runs end at different steps, so that late means are over fewer runs."""
        return len({run.last_step() for run in self.runs}) > 1


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """The runs by what was set, in the order they are given; a run without notes is alone."""
    members: dict[str, list[Run]] = {}
    for place, run in enumerate(runs):
        facts = settings_of(run)
        key = json.dumps(facts, sort_keys=True, default=str) if facts else f"run {place}"
        members.setdefault(key, []).append(run)
    groups = list(members.values())
    names = labels(groups)
    return [
        Group(name, f"c{i % COLOURS}", group)
        for i, (name, group) in enumerate(zip(names, groups, strict=True))
    ]


def settings_of(run: Run) -> dict[str, Any]:
    """The settings that tell runs apart, by dotted name."""
    facts = {
        k: v for k, v in run.settings.items() if k not in NOT_COMPARED and k != "objective_args"
    }
    return dict(flatten(facts)) | dict(flatten(run.objective, "objective."))


def differences(groups: Sequence[Sequence[Run]]) -> dict[str, list[Any]]:
    """Settings with more than one value: those of each group, None where one has the default."""
    facts = [settings_of(group[0]) for group in groups]
    names = dict.fromkeys(name for each in facts for name in each)
    table = {name: [each.get(name) for each in facts] for name in names}
    differing = {name: values for name, values in table.items() if not _all_same(values)}
    # A hyperparameter stands with the objective; the setting that gave it would repeat it.
    objective = [name for name in differing if name.startswith("objective.")]
    repeated = {name.removeprefix("objective.") for name in objective}
    repeated |= {"objective"} if "objective.name" in differing else set()
    return {name: values for name, values in differing.items() if name not in repeated}


def labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Short and unequal: the settings that differ, or the names of the runs."""
    if len(groups) == 1:
        return [run_name(groups[0][0]) if len(groups[0]) == 1 else f"{len(groups[0])} seeds"]
    differing = differences(groups)
    objectives = differing.pop("objective.name", [None] * len(groups))
    everywhere = {k: v for k, v in differing.items() if all(value is not None for value in v)}
    names = []
    for i, group in enumerate(groups):
        parts = [str(objectives[i])] if objectives[i] else []
        parts += [f"{k.removeprefix('objective.')} {v[i]}" for k, v in everywhere.items()]
        label = ", ".join(parts)
        if not label or len(label) > LABEL_LENGTH:
            label = str(objectives[i]) if objectives[i] else run_name(group[0])
        names.append(label)
    if len(set(names)) < len(names):
        names = [run_name(group[0]) for group in groups]
    if len(set(names)) < len(names):
        names = [f"{name} ({i + 1})" for i, name in enumerate(names)]
    return names


def run_name(run: Run) -> str:
    return run.name[:LABEL_LENGTH]


def _all_same(values: Sequence[Any]) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) == 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
