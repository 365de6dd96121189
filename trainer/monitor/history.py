"""A run's folder as its readers see it: `Run` holds the logs and the notes in `run.json`.

Reports and model cards read runs here. What a file holds is checked once, on reading.

A point is `(step, value)`. Logged values that are not finite stay as NaN, so a chart can leave a
gap where they were and a page can say how many there were.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json
from .collapse import SAMPLED_TOKENS
from .margins import SAMPLES_FILE, Histogram, json_lines, read_margins

Point = tuple[float, float]

MAX_POINTS = 400
HEADLINE_METRICS = (
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "reward margin"),
    ("rewards/chosen", "reward, chosen"),
    ("rewards/rejected", "reward, rejected"),
    ("logps/chosen_mean", "log-prob, chosen"),
    ("logps/rejected_mean", "log-prob, rejected"),
    ("lengths/chosen", "tokens, chosen"),
    ("lengths/rejected", "tokens, rejected"),
    ("loss", "loss"),
)
_OF_A_SET = re.compile(
    rf"eval_(.+)_({'|'.join(re.escape(key) for key, _ in HEADLINE_METRICS if '/' in key)})"
)


@dataclass(frozen=True)
class Change:
    """A metric at the start and at the end of a run; `before` is None when it was logged once."""

    label: str
    before: float | None
    after: float


@dataclass(frozen=True)
class Run:
    """The logs and the notes of one training run."""

    folder: Path
    history: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)  # before and after training
    step_samples: list[dict[str, Any]] = field(default_factory=list)  # of `samples.jsonl`
    margins: dict[str, dict[float, Histogram]] = field(default_factory=dict)  # by kind and step
    started: str | None = None
    device: str | None = None
    trained_steps: float = 0.0

    def series(self, key: str) -> list[Point]:
        """All logged values of a metric, in order of steps; the last one counts for a step."""
        points: dict[float, float] = {}
        for entry in self.history:
            step, value = number(entry.get("step")), number(entry.get(key))
            if step is not None and value is not None and math.isfinite(step):
                points[step] = value if math.isfinite(value) else math.nan
        return sorted(points.items())

    def finite(self, key: str) -> list[float]:
        """The values of a metric in order of steps, without those that are not finite."""
        return [value for _, value in self.series(key) if math.isfinite(value)]

    @property
    def name(self) -> str:
        return str(self.settings.get("run_name") or self.folder.resolve().name)

    def last_step(self) -> float:
        steps = [number(entry.get("step")) for entry in self.history]
        logged = (s for s in steps if s is not None and math.isfinite(s))
        return max(logged, default=self.trained_steps)

    def seconds(self) -> float | None:
        """Wall-clock time of training, evaluations included."""
        return self._final("train_runtime")

    def pairs_per_s(self) -> float | None:
        """Pairs per second over all of training: slow stretches count by their time."""
        rates = [rate for rate in self.finite("pairs_per_s") if rate > 0]
        if not rates:
            return self._final("train_samples_per_second")
        return len(rates) / sum(1 / rate for rate in rates)

    def _final(self, key: str) -> float | None:
        values = [number(entry.get(key)) for entry in [self.summary, *self.history]]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        return finite[-1] if finite else None

    def held_out(self) -> dict[str, str]:
        """Prefix of held-out metrics -> end of their labels: "", or ", NAME" of several sets.

        Empty if nothing was evaluated on held-out pairs.
        """
        if any(self.series("eval_" + key) for key, _ in HEADLINE_METRICS):
            return {"eval_": ""}
        keys = dict.fromkeys(key for entry in self.history for key in entry)
        names = [match[1] for key in keys if (match := _OF_A_SET.fullmatch(key))]
        return {f"eval_{name}_": f", {name}" for name in names}

    def prefix(self) -> str:
        """The first of `held_out`; nothing if nothing was evaluated on held-out pairs."""
        return next(iter(self.held_out()), "")

    def changes(self) -> list[Change]:
        """Headline metrics from first to last, of held-out pairs where those were evaluated."""
        changes, sets = [], self.held_out() or {"": ""}
        for (key, label), (prefix, name) in product(HEADLINE_METRICS, sets.items()):
            if values := self.finite(prefix + key):
                before = values[0] if len(values) > 1 else None
                changes.append(Change(label + name, before, values[-1]))
        return changes

    def not_finite(self) -> dict[str, int]:
        """How many logged values of each metric were NaN or infinite."""
        keys = dict.fromkeys(key for entry in self.history for key in entry)
        counts = {key: sum(math.isnan(v) for _, v in self.series(key)) for key in keys}
        return {key: count for key, count in counts.items() if count}


def number(value: object) -> float | None:
    """The value as a float if it is a number (NaN included), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def thin(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS points: means over consecutive ones, NaN where all of them are NaN."""
    size = math.ceil(len(points) / MAX_POINTS) or 1
    if size == 1:
        return points
    thinned = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [value for _, value in part if math.isfinite(value)]
        mean = sum(finite) / len(finite) if finite else math.nan
        thinned.append((sum(step for step, _ in part) / len(part), mean))
    return thinned


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (dotted name, value) rows, without those that are empty."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(value, f"{name}.")
        elif value != []:
            rows.append((name, value))
    return rows


def load_run(run_dir: Path) -> Run:
    """Read `trainer_state.json` (of the run or its newest checkpoint) and, if there, `run.json`."""
    if not run_dir.is_dir():
        raise UserError(
            f"run folder: expected a training run's output_dir, found no folder {run_dir}"
        )
    notes_file = run_dir / "run.json"
    notes = _read_json(notes_file) if notes_file.is_file() else {}
    state_file = _state_file(run_dir, notes.get("run"))
    state = _read_json(state_file)
    history, trained = state.get("log_history"), number(state.get("global_step"))
    if not isinstance(history, list):
        raise UserError(f"{state_file}: expected a list log_history, as transformers writes it")
    parts = ("settings", "objective", "data", "versions", "summary")
    step_samples = _step_samples(run_dir)
    history = [entry for entry in history if isinstance(entry, dict)]
    return Run(
        folder=run_dir,
        history=history + _sampled_lengths(step_samples),
        **{part: _mapping(notes.get(part)) for part in parts},
        samples=[sample for sample in _list(notes.get("samples")) if isinstance(sample, dict)],
        step_samples=step_samples,
        margins=read_margins(run_dir),
        started=notes.get("started"),
        device=notes.get("device"),
        trained_steps=trained if trained is not None and math.isfinite(trained) else 0.0,
    )


def _step_samples(run_dir: Path) -> list[dict[str, Any]]:
    return [
        row
        for row in json_lines(run_dir / SAMPLES_FILE)
        if isinstance(row.get("step"), int) and "prompt" in row and "answer" in row
    ]


def _sampled_lengths(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As entries of the log; a prompt answered again at a step counts once."""
    by_step: dict[int, dict[str, float]] = {}
    for row in samples:
        tokens = number(row.get("tokens"))
        if tokens is not None and math.isfinite(tokens):
            by_step.setdefault(row["step"], {})[str(row["prompt"])] = tokens
    return [
        {"step": step, SAMPLED_TOKENS: sum(each.values()) / len(each)}
        for step, each in by_step.items()
    ]


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _state_file(run_dir: Path, run: Any) -> Path:
    """The run's, or its newest checkpoint's; ``run`` is its id, if `run.json` says it."""
    name = "trainer_state.json"
    ends = run_dir / name
    if ends.is_file() and (run is None or _read_json(ends).get("log_history")):
        return ends
    saved = [p for p in run_dir.glob(f"checkpoint-*/{name}") if p.parent.name[11:].isdigit()]
    if run is not None:
        saved = [path for path in saved if _run_of(path.parent) == run]
    if not saved and ends.is_file():  # from the start of the run, without a log
        return ends
    if not saved:
        raise UserError(
            f"run folder {run_dir}: found no {name} in it or in a checkpoint of its run; "
            "name the output_dir of a training run"
        )
    return max(saved, key=lambda path: int(path.parent.name[11:]))


def _run_of(checkpoint: Path) -> Any:
    manifest = checkpoint / "manifest.json"
    return _mapping(_read_json(manifest).get("run")).get("id") if manifest.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: expected readable JSON, got {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
