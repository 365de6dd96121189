"""Whole training steps as a table."""

from bench.lib.record import Row
from bench.lib.table import markdown
from bench.training.contenders import BASES, LAYOUTS

CASE = (
    *("case", "long_prompts", "objective", "attention", "dtype", "pairs_per_step", "device"),
    *("micro_batches", "checkpointing", "lora"),
)
"""What rows of one table have in common, beside the commit."""
COLUMNS = ("trainer", "pairs/s", "step ms (min–max)", "× TRL", "tokens a step", "peak memory MiB")

LAYOUT_COLUMNS = (
    *("model", "prompt/chosen/rejected", "layout", "pairs/s", "× padded"),
    *("tokens a step", "peak memory MiB"),
)


def table(rows: list[Row]) -> str:
    """Markdown: a heading per case, a line per contender."""
    groups: dict[str, list[list[str]]] = {}
    for row in rows:
        lengths = "/".join(str(round(n)) for n in row["mean_lengths"].values())
        heading = (
            f"{row['case']}, {row['objective']}, {row['pairs_per_step']} pairs a step, "
            f"prompt/chosen/rejected {lengths} tokens, {row['attention']}, {row['dtype']}"
            f"{variant(row)}; {row['device_name']}; torch {row['versions']['torch']}; "
            f"{(row['commit'] or 'no commit')[:9]}"
        )
        base = next((r for r in rows if r["provider"] in BASES and same_case(r, row)), {})
        groups.setdefault(heading, []).append([row["provider"], *_cells(row, base)])
    return "\n\n".join(f"{title}\n\n{markdown(COLUMNS, lines)}" for title, lines in groups.items())


def _cells(row: Row, base: Row) -> list[str]:
    if "reason" in row:
        return ["–", row["reason"].replace("|", "/"), "–", "–", "–"]
    times = row["step_ms"]
    return [
        f"{row['pairs_per_s']:.2f}",
        f"{times['median']:.0f} ({times['min']:.0f}–{times['max']:.0f})",
        f"{row['pairs_per_s'] / base['pairs_per_s']:.2f}" if "pairs_per_s" in base else "–",
        f"{row['tokens_per_step']:.0f}",
        f"{row['peak_mib']:.0f}",
    ]


def same_case(a: Row, b: Row) -> bool:
    """Whether two rows are of one run."""
    return all(a.get(key, False) == b.get(key, False) for key in (*CASE, "commit"))


def variant(row: Row) -> str:
    """The ways in which a run differs from full training without checkpointing."""
    return ", LoRA" * row.get("lora", False) + ", checkpointing" * row.get("checkpointing", False)


def layouts_table(rows: list[Row]) -> str:
    """Markdown: our layouts of each case against padded rows."""
    lines = []
    for row in rows:
        layout = row["provider"].removeprefix("widemargin-")
        if layout not in LAYOUTS or "reason" in row:
            continue
        padded = [r for r in rows if same_case(r, row) and r["provider"] == "widemargin-padded"]
        times = [f"{row['pairs_per_s'] / base['pairs_per_s']:.2f}" for base in padded] or ["–"]
        lengths = "/".join(str(round(n)) for n in row["mean_lengths"].values())
        speed, tokens = f"{row['pairs_per_s']:.2f}", f"{row['tokens_per_step']:.0f}"
        memory = f"{row['peak_mib']:.0f}"
        lines.append([row["case"], lengths, layout, speed, times[0], tokens, memory])
    return markdown(LAYOUT_COLUMNS, lines, text=3)
