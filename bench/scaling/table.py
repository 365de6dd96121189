"""Tables of the scaling curves."""

import math

from bench.lib.plots import label
from bench.lib.record import Row
from bench.lib.table import markdown
from bench.scaling.curves import SIZES, both_tails, crossover


def table(rows: list[Row]) -> str:
    """Tables of every curve that is there."""
    curves = {curve: [row for row in rows if row["curve"] == curve] for curve in TABLES}
    parts = [TABLES[curve](rows) for curve, rows in curves.items() if rows]
    return "\n\n".join(part for part in parts if part)


def _size(rows: list[Row]) -> str:
    curve, first = rows[0]["curve"], rows[0]
    fixed = ", ".join(f"{SIZES[o]} {first[o]:,}" for o in SIZES if o != curve)
    return f"Against {SIZES[curve]}; {fixed}.\n\n{_by_provider(rows, curve, SIZES[curve])}"


def _sequence(rows: list[Row]) -> str:
    first = rows[0]
    return (
        f"Forward and backward of a whole model ({first['case']}, {first['pairs']} pairs, half of "
        "each chosen sequence prompt) against the length of its sequences.\n\n"
        + _by_provider(rows, "length", "tokens", full_logits="full logits, padded")
    )


def _by_provider(rows: list[Row], key: str, column: str, full_logits: str = "full-logits") -> str:
    """Time and memory: a line per value of ``key``, a column per provider."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for at in dict.fromkeys(row[key] for row in rows):
        here = {row["provider"]: row for row in rows if row[key] == at}
        lines.append([f"{at:,}", *(_time_and_memory(here[name]) for name in names)])
    labels = [full_logits if name == "full-logits" else label(name) for name in names]
    return markdown([column, *(f"{text}: ms / MiB" for text in labels)], lines)


def _time_and_memory(row: Row) -> str:
    if "total_ms" not in row:
        return str(row.get("gate", "–"))
    peak = row.get("peak_extra_mib", {}).get("allocator")
    return f"{row['total_ms']['median']:.1f} / " + ("–" if peak is None else f"{peak:.0f}")


def _active(rows: list[Row]) -> str:
    lines = [
        [
            f"{mean['entropy']:.2f}", f"2^{math.log2(mean['tail_eps']):.0f}",
            f"{mean['active_fraction']:.2f}", f"{mean['total_ms']['median']:.1f}",
            f"{exact['total_ms']['median']:.1f}",
            f"{exact['total_ms']['median'] / mean['total_ms']['median']:.2f}",
            f"{mean['errors']['dhidden']:.0e}",
        ]
        for mean, exact in both_tails(rows)
    ]  # fmt: skip
    if not lines:
        return ""
    at = crossover(rows)
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


def _ranks(rows: list[Row]) -> str:
    lines = [
        [
            row["case"], row["ranks"],
            f"{row['pairs_per_s']:.2f}" if "pairs_per_s" in row else row.get("reason", "–"),
            "`plan`'s model" if row["provider"] == "plan" else "measured",
        ]
        for row in rows
    ]  # fmt: skip
    here = [row for row in rows if "pairs_per_s" in row and "assumed" not in row]
    rates, plan = (
        {row["ranks"]: row["pairs_per_s"] for row in here if row["provider"] == provider}
        for provider in ("measured", "plan")
    )
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
    assumed = next((row["assumed"] for row in rows if "assumed" in row), None)
    text += f" Assumed for the GPUs: {assumed}." if assumed else ""
    return f"{text}\n\n{markdown(('model', 'ranks', 'pairs/s', 'from'), lines)}"


TABLES = dict.fromkeys(SIZES, _size)
TABLES |= {"active": _active, "sequence": _sequence, "ranks": _ranks}
