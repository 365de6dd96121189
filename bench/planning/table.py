"""What happens to pairs before the first step, as tables."""

from bench.lib.record import Row
from bench.lib.table import markdown


def table(rows: list[Row]) -> str:
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
