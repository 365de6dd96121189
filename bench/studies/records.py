"""Runs that ended, one line of JSON each, a file per study."""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.studies.questions import STUDIES, Run

Record = dict[str, Any]
_LOCK = threading.Lock()
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Run)
    if field.default is not dataclasses.MISSING
}


def read(out: Path, study: str) -> list[Record]:
    """What a study has so far; a line that was cut by a crash is left out."""
    path = out / f"{study}.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append(out: Path, record: Record) -> None:
    """Add a run, on a line of its own even after one that was cut."""
    path = out / f"{record['study']}.jsonl"
    with _LOCK:
        out.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        with path.open("a") as file:
            file.write("" if before[-1:] in (b"", b"\n") else "\n")
            file.write(json.dumps(record) + "\n")


def is_done(run: Run, records: Iterable[Record]) -> bool:
    """Whether one of ``records`` is this very run; older ones lack what has a default."""
    fields = json.loads(json.dumps(vars(run)))
    return any(
        fields == {key: (_DEFAULTS | record).get(key) for key in fields} for record in records
    )


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records of each arm, in the study's order of arms, by seed."""
    records = list(records)
    order = [run.arm for run in STUDIES[records[0]["study"]](0)] if records else []
    arms = {arm: [r for r in records if r["arm"] == arm] for arm in order}
    return {arm: sorted(rs, key=lambda r: r["seed"]) for arm, rs in arms.items() if rs}


def at_step(record: Record, step: int) -> Record:
    """The measurement taken there."""
    return next(m for m in record["measurements"] if m["step"] == step)


def last(record: Record) -> Record:
    return record["measurements"][-1]


def paired(one: list[Record], other: list[Record]) -> list[tuple[Record, Record]]:
    """Records of two arms that share a seed, and so data, order and noise."""
    others = {record["seed"]: record for record in other}
    return [(record, others[record["seed"]]) for record in one if record["seed"] in others]


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def shown(values: list[float], digits: int = 3, sign: bool = False) -> str:
    """``mean ± standard error``."""
    mean, error = mean_and_error(values)
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"
