"""The page of results, made from a folder's JSON and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.head import table as head
from bench.lib.real_model import FOLDER
from bench.lib.record import Row
from bench.lib.table import machine, markdown
from bench.planning import table as planning
from bench.scaling import table as scaling
from bench.scaling.curves import SIZES
from bench.training import table as training
from bench.training.contenders import HYBRIDS

KINDS = {"linear_logprob": "head", "training": "training", "scaling": "scaling"}
KINDS |= {"planning": "planning", "active": "active", "adamw": "adamw"}
NEEDS_GPU = {
    "head": "times and memory of the Triton head against its peers",
    "training": "whole training steps",
    "tune": "the head's fastest tiles",
    "scaling": "the head's scaling curves",
}
REAL = FOLDER.name
INTRO = """\
# Results

<!-- Made by `python -m bench.report`; edit bench/report/page.py instead. -->
This page has every measurement, so that you can check each claim. `python -m bench.report` makes
each figure from the JSON file named below it, and only committed code writes those files. `make
bench` measures the same on your machine in under ten minutes, and `make bench-real` a real model
within an hour. `bench/README.md` explains the method and each key of a row. A line's load is the
machine's when a run began: above a few tenths of a core, CPU times say little.
"""
NOTES = {
    "training": (
        "*pairs/s* counts each step's fastest time, which other programs disturbed least; "
        "*step ms* is the median of all times. *× TRL* compares pairs/s. *tokens a step* are those "
        "that the decoder computes, padding included.",
    )
}
"""What the columns of a section's tables mean, by its kind."""


@dataclass(frozen=True)
class File:
    """A file of results; `kind` is a value of `KINDS`, or tune, resources or other."""

    path: Path
    kind: str
    content: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    @property
    def device(self) -> str:
        """cuda where the rows, or the file itself, come from a GPU."""
        on_gpu = self.kind == "tune" and "device_name" in self.content
        return "cuda" if on_gpu or self.rows[0].get("device") == "cuda" else "cpu"

    @property
    def is_real(self) -> bool:
        """Whether the rows are of the real model of `bench/lib/real_model.py`."""
        return self.rows[0].get("case") == REAL

    def pictures(self) -> dict[str, list[Row]]:
        """Names of the pictures beside this file, with the rows they show."""
        stem = self.path.stem
        if self.kind == "head":
            cases: dict[str, list[Row]] = {}
            for row in self.rows:
                if row["distribution"] == "peaked":
                    cases.setdefault(row["case"], []).append(row)
            cases = {c: rows for c, rows in cases.items() if any("total_ms" in r for r in rows)}
            alone = len({row["case"] for row in self.rows}) == 1
            return {f"{stem}.png" if alone else f"{stem}-{c}.png": r for c, r in cases.items()}
        if self.kind == "scaling":
            sizes = [r for r in self.rows if r["curve"] in SIZES]
            rest = [r for r in self.rows if r["curve"] not in SIZES]
            both = {f"{stem}-sizes.png": sizes, f"{stem}-rest.png": rest}
            return {
                name: rows for name, rows in both.items() if any("reason" not in r for r in rows)
            }
        if self.kind == "training":
            return {f"{stem}.png": self.rows} if any("losses" in r for r in self.rows) else {}
        return {f"{stem}.png": self.rows} if self.kind == "active" else {}


def read_files(folder: Path) -> list[File]:
    """Every file of results in the folder, CPU before GPU, the real model first, then by name."""
    files = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("rows"):
            files.append(File(path, _kind(path, content), content))
    return sorted(files, key=lambda file: (file.device == "cuda", not file.is_real, file.path))


def _kind(path: Path, content: dict[str, Any]) -> str:
    row = content["rows"][0]
    if "kernel" in row and "registers" in row:
        return "resources"
    if "tile" in row:
        return "tune"
    if row.get("form") in ("pairs", "cells"):
        return "active"
    return KINDS.get(row.get("op", ""), "other")


def page(files: list[File], link: str) -> str:
    """Markdown.

    Args:
        link: from the page's folder to that of the results, with a slash at its end, or "".
    """
    parts = [INTRO.strip(), _missing(files)]
    sections = (
        ("head", "The head alone", _head),
        ("training", "Whole training steps", _training),
        ("scaling", "Scaling", _scaling),
        ("planning", "Before the first step", _planning),
        ("active", "Work against gradient error", _active),
        ("adamw", "The averaged tail under AdamW", _adamw),
        ("tune", "Tiles", _tune),
        ("resources", "Compiled kernels", _resources),
    )
    for kind, title, text in sections:
        if sources := [file for file in files if file.kind == kind]:
            parts += [f"## {title}", *NOTES.get(kind, ())]
            parts += [f"{text(file)}\n\n{_source(file, link)}" for file in sources]
    return "\n\n".join(parts) + "\n"


def _source(file: File, link: str) -> str:
    """The file's pictures, and where the figures are from."""
    shown = [f"![{_alt(file, rows)}]({link}{name})" for name, rows in file.pictures().items()]
    return "\n\n".join([*shown, f"From [{file.path.name}]({link}{file.path.name})."])


def _alt(file: File, rows: list[Row]) -> str:
    texts = {
        "head": "Time, memory, and error against work of each head",
        "training": "Speed, tokens, memory and losses of each trainer",
        "scaling": "Time and memory as sizes grow",
        "active": "Work against gradient error",
    }
    case = f", case {rows[0]['case']}" if file.kind == "head" else ""
    return texts[file.kind] + case


def _missing(files: list[File]) -> str:
    """What no GPU has measured, said plainly."""
    there = {file.kind for file in files if file.device == "cuda"}
    absent = [text for kind, text in NEEDS_GPU.items() if kind not in there]
    if not absent:
        return "CPU and GPU figures stand side by side below, each with its machine."
    none = "**No figure on this page comes from a GPU.** " if not there else ""
    return (
        f"{none}Not measured on a GPU yet: {'; '.join(absent)}. `bash bench/gpu.sh` makes these "
        "files, and this page shows them as soon as they are in the folder of results."
    )


def _head(file: File) -> str:
    return (
        head.table(file.rows)
        + "\n\n*products*: the time over that of one bare product of hidden states and weight, "
        "which every head needs. *passes*: the operations of all its products over those of that "
        "one. *active*: the share that routing left for backward. Errors are relative to fp64."
    )


def _training(file: File) -> str:
    gaps: dict[str, float] = {}
    for row in file.rows:
        if (gap := row.get("largest_loss_gap")) is not None:
            case = f"{row['objective']}, {'long' if row['long_prompts'] else 'short'} prompts"
            gaps[case] = max(gap, gaps.get(case, 0))
    said = "; ".join(f"{case}: {gap:.0e}" for case, gap in gaps.items())
    text = f"\n\nLargest relative difference between the trainers' losses of a step: {said}."
    return training.table(file.rows) + (text if gaps else "") + _quiet(file.rows)


def _quiet(rows: list[Row]) -> str:
    """How much other programs and chance had a share in these steps, where it was measured."""
    rows = [row for row in rows if "others_load" in row]
    if not rows:
        return ""
    load = max(row["others_load"] for row in rows)
    spread = max(row.get("spread", 0) for row in rows)
    return (
        f" Other programs used at most {load:.0%} of the machine; a step's "
        f"two fastest times differed by at most {spread:.0%}."
    )


def _scaling(file: File) -> str:
    return f"{machine(file.rows[0])}\n\n{scaling.table(file.rows)}"


def _planning(file: File) -> str:
    row = {"device": "cpu", **file.rows[0]}
    return f"{machine(row)}\n\n{planning.table(file.rows)}"


def _active(file: File) -> str:
    commit = (file.content.get("commit") or file.rows[0].get("commit") or "no commit")[:9]
    return (
        f"At the op's and the trainer's default `tail_eps`; {commit}. *pairs* are single (token, "
        "block) pairs, *cells* sorted tiles of 128 tokens; *x* says by how much a model's logits "
        "were sharpened. `python -m bench.head.active --model DIR --pairs FILE` does this for "
        f"your own model.\n\n{head.active_table(file.rows)}"
    )


def _adamw(file: File) -> str:
    row = {"device": "cpu", **file.rows[0]}
    return (
        f"{row['case']}, {row['steps']} AdamW steps of SimPO on {row['pairs_per_step']} pairs "
        f"({row['tokens_per_step']} tokens) each, fp32; {machine(row)} Weights and margins: how "
        "far they end from those of the exact tail, as a share of the way that it goes. Times: "
        "forward and backward of the head alone, on "
        f"{max(row.get('timed_tokens', 0) for row in file.rows):,} tokens.\n\n"
        f"{head.adamw_table(file.rows)}"
    )


def _tune(file: File) -> str:
    name = file.content.get("device_name")
    entries = file.content.get("entries") or {}
    if name is None:
        return "Candidates that compile, without a GPU."
    tiles = "\n\n".join(f"{dtype}:\n```\n{entry}\n```" for dtype, entry in entries.items() if entry)
    return (
        f"Fastest on {name}, {(file.content.get('commit') or 'no commit')[:9]}.\n\n{tiles}".strip()
    )


def _resources(file: File) -> str:
    return (
        f"Every Triton kernel compiled without a GPU, triton {file.content['triton']} "
        f"(`python -m bench.compile.resources`).\n\n{resources_table(file.rows)}"
    )


def head_table(files: Iterable[File]) -> str:
    """The table of heads on docs/kernel.md: the standard case on each device that was measured."""
    names = ("head_cpu", "head_cuda", "head")
    rows = [row for f in files if f.kind == "head" and f.path.stem in names for row in f.rows]
    return head.table([row for row in rows if row["case"] in ("cpu", "llama3-8b")])


def hybrid_table(files: Iterable[File]) -> str:
    """The table of performance.md: our layouts of models with recurrent layers."""
    rows = [row for f in files if f.kind == "training" for row in f.rows if row["case"] in HYBRIDS]
    if not rows:
        return "Not measured yet: `python -m bench.all --hybrids --out bench/results`."
    row = rows[0]
    return (
        f"{row['objective']}, {row['pairs_per_step']} pairs a step, {row['attention']}, "
        f"{row['dtype']}; {machine(row)}{_quiet(rows)}\n\n{training.layouts_table(rows)}"
    )


def active_table(files: Iterable[File]) -> str:
    """The table of how-the-head-works.md."""
    return head.active_table([row for f in files if f.kind == "active" for row in f.rows])


def adamw_table(files: Iterable[File]) -> str:
    """The table of how-the-head-works.md."""
    return "\n\n".join(_adamw(file) for file in files if file.kind == "adamw")


def resources_table(rows: list[Row]) -> str:
    """The compiled kernels in one line per architecture."""
    lines = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        here = [r for r in rows if r["arch"] == arch]
        good = [r for r in here if "error" not in r]
        lines.append(
            [
                arch, len(here), max(r["registers"] for r in good),
                sum(r["spill_bytes"] > 0 for r in good),
                f"{max(r['shared_bytes'] for r in good) / 1024:.0f}", len(here) - len(good),
            ]
        )  # fmt: skip
    columns = ("chip", "kernels", "most registers", "that spill", "most shared KiB", "failed")
    return markdown(columns, lines)
