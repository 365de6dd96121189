"""Markdown tables of the results that have no table of their own elsewhere."""

from __future__ import annotations

import math
from typing import Any

from widemargin.kernels.linear_logprob import TAIL_EPS

from bench.lib.colours import label
from bench.lib.record import Row
from bench.lib.table import markdown
from bench.scaling.curves import SIZES, both_tails, crossover

FORMS = {"pairs": "pairs (torch)", "cells": "cells (Triton)"}


def machine(row: Row) -> str:
    """Where and with what a row was measured."""
    load = row.get("load_average")
    busy = f", load {load:.1f} when it began" if load is not None and row["device"] == "cpu" else ""
    commit = (row["commit"] or "no commit")[:9] + (", uncommitted changes" if row["dirty"] else "")
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    return f"{row['device_name']}{threads}{busy}; torch {row['versions']['torch']}; {commit}."


def scaling(rows: list[Row]) -> str:
    """Tables of every curve that is there."""
    parts = [_size(curve, rows) for curve in SIZES]
    parts += [_active(rows), _sequence(rows), _ranks(rows)]
    return "\n\n".join(part for part in parts if part)


def _size(curve: str, rows: list[Row]) -> str:
    found = [row for row in rows if row["curve"] == curve]
    if not found:
        return ""
    names = list(dict.fromkeys(row["provider"] for row in found))
    lines = []
    for at in dict.fromkeys(row[curve] for row in found):
        here = {row["provider"]: row for row in found if row[curve] == at}
        lines.append([f"{at:,}", *(_time_and_memory(here[name]) for name in names)])
    fixed = ", ".join(f"{SIZES[o]} {found[0][o]:,}" for o in SIZES if o != curve)
    table = markdown([SIZES[curve], *(f"{label(name)}: ms / MiB" for name in names)], lines)
    return f"Against {SIZES[curve]}; {fixed}.\n\n{table}"


def _time_and_memory(row: Row) -> str:
    if "total_ms" not in row:
        return str(row.get("gate", "–"))
    peak = row.get("peak_extra_mib", {}).get("allocator")
    return f"{row['total_ms']['median']:.1f} / " + ("–" if peak is None else f"{peak:.0f}")


def _active(rows: list[Row]) -> str:
    found = [row for row in rows if row["curve"] == "active"]
    lines = [
        [
            f"{mean['entropy']:.2f}", f"2^{math.log2(mean['tail_eps']):.0f}",
            f"{mean['active_fraction']:.2f}", f"{mean['total_ms']['median']:.1f}",
            f"{exact['total_ms']['median']:.1f}",
            f"{exact['total_ms']['median'] / mean['total_ms']['median']:.2f}",
            f"{mean['errors']['dhidden']:.0e}",
        ]
        for mean, exact in both_tails(found)
    ]  # fmt: skip
    if not lines:
        return ""
    at = crossover(found)
    meets = (
        f"they take the same time at an active fraction of {at:.2f}"
        if at is not None
        else "mean stays faster at every fraction measured"
    )
    text = (
        "Tail mean against tail exact from nearly certain tokens to flat ones; " + meets + ". A "
        "block of vocabulary that is active for more than three quarters of the tokens takes all "
        "of them without gathering, so the dense path is reached block by block."
    )
    columns = ("entropy", "tail_eps", "active", "mean ms", "exact ms", "exact / mean", "error dH")
    return f"{text}\n\n{markdown(columns, lines)}"


def _sequence(rows: list[Row]) -> str:
    found = [row for row in rows if row["curve"] == "sequence"]
    if not found:
        return ""
    names = list(dict.fromkeys(row["provider"] for row in found))
    lines = []
    for at in dict.fromkeys(row["length"] for row in found):
        here = {row["provider"]: row for row in found if row["length"] == at}
        lines.append([f"{at:,}", *(_time_and_memory(here[name]) for name in names)])
    first = found[0]
    table = markdown(["tokens", *(f"{_way(name)}: ms / MiB" for name in names)], lines)
    return (
        f"Forward and backward of a whole model ({first['case']}, {first['pairs']} pairs, half of "
        f"each chosen sequence prompt) against the length of its sequences.\n\n{table}"
    )


def _way(name: str) -> str:
    return "full logits, padded" if name == "full-logits" else label(name)


def _ranks(rows: list[Row]) -> str:
    found = [row for row in rows if row["curve"] == "ranks"]
    if not found:
        return ""
    lines = [
        [
            row["case"], row["ranks"],
            f"{row['pairs_per_s']:.2f}" if "pairs_per_s" in row else row.get("reason", "–"),
            "`plan`'s model" if row["provider"] == "plan" else "measured",
        ]
        for row in found
    ]  # fmt: skip
    rates = {
        r["ranks"]: r["pairs_per_s"]
        for r in found
        if r["provider"] == "measured" and "pairs_per_s" in r
    }
    plan = {
        r["ranks"]: r["pairs_per_s"]
        for r in found
        if r["provider"] == "plan" and "assumed" not in r
    }
    text = (
        "Pairs per second against ranks. Measured: the same steps by one process and by two (DDP "
        "over gloo), one thread each, on one machine, whose cores, caches and memory two processes "
        "share. The model is given the one process's speed; for the 8B model on GPUs nothing was "
        "measured."
    )
    if {1, 2} <= rates.keys() and 2 in plan:
        text += (
            f" Two processes reach {rates[2] / rates[1]:.2f} times one's pairs/s; the model says "
            f"{plan[2] / plan[1]:.2f}."
        )
    assumed = next((row["assumed"] for row in found if "assumed" in row), None)
    text += f" Assumed for the GPUs: {assumed}." if assumed else ""
    return f"{text}\n\n{markdown(('model', 'ranks', 'pairs/s', 'from'), lines)}"


def planning(rows: list[Row]) -> str:
    """What happens to pairs before the first step."""
    lines = [
        [
            row["provider"], f"{row['pairs']:,}", f"{row['seconds']['median']:.2f}",
            f"{row['speedup']:.2f}" if "speedup" in row else "–",
        ]
        if "seconds" in row
        else [row["provider"], "–", row.get("reason", "–"), "–"]
        for row in rows
        if row["case"] == "prepare"
    ]  # fmt: skip
    parts = [markdown(("from text to batches", "pairs", "seconds", "× fastest of TRL"), lines)]
    for row in rows:
        if row["case"] == "million" and "reason" in row:
            parts.append(f"An epoch of many pairs was not planned: {row['reason']}")
        elif row["case"] == "million":
            times = ", ".join(f"{value:.2f} s {name}" for name, value in row["seconds"].items())
            parts.append(
                f"An epoch of {row['pairs']:,} pairs for 8 ranks is planned in {times}, with "
                f"{row['peak_extra_mib']:.0f} MiB beyond the lengths."
            )
    balance = [
        [
            row["micro_batches"], "coupled" if row["coupled"] else "free", f"{row['step']:.3f}",
            f"{row['worst_step']:.3f}", f"{row['micro_batch']:.3f}",
        ]
        for row in rows
        if row["case"] == "balance"
    ]  # fmt: skip
    if balance:
        columns = ("micro-batches", "pairs are", "mean step", "worst step", "micro-batch")
        text = f"Tokens of the busiest of {rows[0]['ranks']} ranks over the mean."
        parts.append(f"{text}\n\n{markdown(columns, balance)}")
    return "\n\n".join(parts)


def active(rows: list[Row]) -> str:
    """Work and error at the default bound, on real hidden states and on the standard case."""
    lines = [
        [
            row["case"], FORMS[row["form"]], f"{row['entropy']:.1f}",
            f"{row['active_fraction']:.2f}", f"{row['backward_passes']:.2f}",
            f"{row['averaged_mass_mean']:.1e}", f"{row['errors']['dhidden']:.0e}",
            f"{row['errors']['dweight']:.0e}",
        ]
        for row in rows
        if row["tail_eps"] == TAIL_EPS
    ]  # fmt: skip
    columns = (
        "hidden states", "routed", "entropy, nats", "active fraction", "backward, passes",
        "averaged mass", "error of dH", "error of dW",
    )  # fmt: skip
    return markdown(columns, lines, text=2)


def resources(content: dict[str, Any]) -> str:
    """The compiled kernels in one line per architecture."""
    lines = []
    for arch in dict.fromkeys(row["arch"] for row in content["rows"]):
        rows = [r for r in content["rows"] if r["arch"] == arch]
        good = [r for r in rows if "error" not in r]
        lines.append(
            [
                arch, len(rows), max(r["registers"] for r in good),
                sum(r["spill_bytes"] > 0 for r in good),
                f"{max(r['shared_bytes'] for r in good) / 1024:.0f}", len(rows) - len(good),
            ]
        )  # fmt: skip
    columns = ("chip", "kernels", "most registers", "that spill", "most shared KiB", "failed")
    return markdown(columns, lines)
