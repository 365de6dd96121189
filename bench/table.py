"""A Markdown table from rows of JSON: `python -m bench.table RESULTS.json ...`."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLUMNS = (
    ("provider", "---"),
    ("forward ms", "---:"),
    ("backward ms", "---:"),
    ("total ms (min–max)", "---:"),
    ("× full logits", "---:"),
    ("extra memory, % of logits", "---:"),
    ("error logp / dH / dW", "---:"),
    ("active", "---:"),
)


def table(rows: list[dict[str, Any]]) -> str:
    """One heading line per case and device, one table line per row."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(_heading(row), []).append(_line(row))
    head = [_join(title for title, _ in COLUMNS), _join(align for _, align in COLUMNS)]
    return "\n\n".join("\n".join([title, "", *head, *lines]) for title, lines in groups.items())


def _heading(row: dict[str, Any]) -> str:
    commit = (row["commit"] or "no commit")[:9] + (", dirty" if row["dirty"] else "")
    # What else ran on the machine: the rows of a busy one are not worth much.
    busy = f", load {row['load_average']:.1f}" if row["device"] == "cpu" else ""
    return (
        f"{row['case']}: N {row['tokens']}, H {row['hidden_size']}, V {row['vocab']}, "
        f"{row['dtype']}, {row['distribution']}, entropy {row['entropy']:.2f}; "
        f"{row['device_name']}, {row['threads']} threads{busy}; "
        f"torch {row['versions']['torch']}; {commit}"
    )


def _line(row: dict[str, Any]) -> str:
    errors = row.get("errors")
    shown = " / ".join(f"{error:.0e}" for error in errors.values()) if errors else "–"
    if "total_ms" not in row:
        reason = f"{row['gate']}: {row.get('reason', '')}".replace("|", "/")
        return _join([row["provider"], "–", "–", reason, "–", "–", shown, "–"])
    total = row["total_ms"]
    active = row.get("active_fraction")
    return _join(
        [
            row["provider"],
            f"{row['forward_ms']['median']:.1f}",
            f"{row['backward_ms']['median']:.1f}",
            f"{total['median']:.1f} ({total['min']:.1f}–{total['max']:.1f})",
            f"{row['speedup']['total']:.2f}" if "speedup" in row else "–",
            f"{row['peak_extra_percent_of_logits']:.1f}" if "peak_extra_mib" in row else "–",
            shown,
            "–" if active is None else f"{active:.3f}",
        ]
    )


def _join(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(paths: list[str]) -> None:
    rows = [row for path in paths for row in json.loads(Path(path).read_text())["rows"]]
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
