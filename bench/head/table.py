"""The head's rows as tables: providers of a case; work against error; what AdamW makes of it."""

import math

from widemargin.kernels.linear_logprob import TAIL_EPS, TRAINING_TAIL_EPS

from bench.lib.record import Row
from bench.lib.table import markdown

COLUMNS = (
    "provider",
    "forward ms",
    "backward ms",
    "total ms (min–max)",
    "× full logits",
    "products",
    "passes",
    "extra memory, % of logits",
    "error logp / dH / dW",
    "active",
)


def table(rows: list[Row]) -> str:
    """A heading per case and device, a line per row; what is not available, with the reason."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_heading(row), []).append(row)
    parts = []
    for title, group in groups.items():
        lines = [_cells(row) for row in group if row["gate"] != "not available"]
        parts.append("\n".join([title, "", markdown(COLUMNS, lines), *_not_available(group)]))
    return "\n\n".join(parts)


def _not_available(rows: list[Row]) -> list[str]:
    """One line that names the providers this machine cannot run, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["gate"] == "not available":
            reasons.setdefault(row.get("reason", "no reason given"), []).append(row["provider"])
    parts = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
    return ["", f"Not available here: {'; '.join(parts)}."] if parts else []


def _heading(row: Row) -> str:
    commit = (row["commit"] or "no commit")[:9] + (", dirty" if row["dirty"] else "")
    # What else ran on the machine: the rows of a busy one are not worth much.
    busy = f", load {row['load_average']:.1f}" if row["device"] == "cpu" else ""
    return (
        f"{row['case']}: N {row['tokens']}, H {row['hidden_size']}, V {row['vocab']}, "
        f"{row['dtype']}, {row['distribution']}, entropy {row['entropy']:.2f}; "
        f"{row['device_name']}, {row['threads']} threads{busy}; "
        f"torch {row['versions']['torch']}; {commit}"
    )


def _cells(row: Row) -> list[str]:
    errors = row.get("errors")
    shown = " / ".join(f"{error:.0e}" for error in errors.values()) if errors else "–"
    if "total_ms" not in row:
        reason = f"{row['gate']}: {row.get('reason', '')}".replace("|", "/")
        return [row["provider"], "–", "–", reason, "–", "–", "–", "–", shown, "–"]
    total = row["total_ms"]
    active = row.get("active_fraction")
    return [
        row["provider"],
        f"{row['forward_ms']['median']:.1f}",
        f"{row['backward_ms']['median']:.1f}",
        f"{total['median']:.1f} ({total['min']:.1f}–{total['max']:.1f})",
        f"{row['speedup']['total']:.2f}" if "speedup" in row else "–",
        f"{row['products']:.2f}" if "products" in row else "–",
        f"{row['passes']:.2f}" if "passes" in row else "–",
        f"{row['peak_extra_percent_of_logits']:.1f}" if "peak_extra_mib" in row else "–",
        shown,
        "–" if active is None else f"{active:.3f}",
    ]


FORMS = {"pairs": "pairs (torch)", "cells": "cells (Triton)"}


def active_table(rows: list[Row]) -> str:
    """Work and error at the op's default and at the trainer's, by hidden states and routing."""
    defaults = {f"2^{math.log2(eps):.0f}": eps for eps in (TAIL_EPS, TRAINING_TAIL_EPS)}
    by_case = {(row["case"], row["form"], row["tail_eps"]): row for row in rows}
    lines = []
    for case, form in dict.fromkeys((row["case"], row["form"]) for row in rows):
        at = [by_case[case, form, eps] for eps in defaults.values()]
        lines.append([case, FORMS[form], f"{at[0]['entropy']:.1f}"])
        for row in at:
            errors = (f"{row['errors'][name]:.0e}" for name in ("dhidden", "dweight"))
            lines[-1] += [f"{row['active_fraction']:.3f}", *errors]
    columns = ["hidden states", "routed", "entropy, nats"]
    for eps in defaults:
        columns += [f"active at {eps}", "error of dH", "error of dW"]
    return markdown(columns, lines, text=2)


def adamw_table(rows: list[Row]) -> str:
    """What a bound costs and how far it leads from the exact gradient's weights, by `tail_eps`."""
    lines = []
    for row in rows:
        eps, distance, errors = row["tail_eps"], row.get("distance"), row.get("errors")
        way = f"2^{math.log2(eps):.0f}" if eps else "exact"
        if not row["tops"]:
            way += ", without tops"
        if row["autocast"]:
            way += ", bf16 autocast"
        times = [_times(row), _times(row.get("sharpened", {}))]
        gaps = [f"{errors[name]:.0e}" for name in ("dhidden", "dweight")] if errors else ["–"] * 2
        far = ["–"] * 4
        if distance:
            far = [f"{distance[name]:.1%}" for name in ("all", "head", "others")]
            far.append(f"{row['margin_gap']:.2%}")
        lines.append([way, *times, *gaps, *far])
    columns = (
        "`tail_eps`", "head, × full logits", "with logits x 2", "error of dH", "error of dW",
        "all weights", "the head's", "others", "margins of other pairs",
    )  # fmt: skip
    return markdown(columns, lines)


def _times(row: Row) -> str:
    return f"{row['times_full_logits']:.2f}" if "times_full_logits" in row else "–"
