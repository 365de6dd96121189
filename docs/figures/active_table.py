"""Writes the table of how-the-head-works.md from bench/results/active.json:

`python docs/figures/active_table.py`, after `python -m bench.active`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "active.json"
PAGE = ROOT / "docs" / "how-the-head-works.md"
OPEN, CLOSE = "<!-- table:active -->", "<!-- /table -->"
DEFAULT = 2**-11
FORMS = {"pairs": "pairs (torch)", "cells": "cells (Triton)"}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line per case and form at the default ``tail_eps``."""
    lines = [
        "| hidden states | entropy, nats | form | active fraction | backward, passes "
        "| averaged mass, mean | error of dH | error of dW |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row["tail_eps"] == DEFAULT:
            cells = (
                row["case"],
                f"{row['entropy']:.1f}",
                FORMS[row["form"]],
                f"{row['active_fraction']:.2f}",
                f"{row['backward_passes']:.2f}",
                f"{row['averaged_mass_mean']:.3f}",
                f"{row['errors']['dhidden']:.0e}",
                f"{row['errors']['dweight']:.0e}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page_with_table(page: str) -> str:
    """The page with the table as the results have it now."""
    before, _, rest = page.partition(OPEN)
    after = rest.partition(CLOSE)[2]
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    return f"{before}{OPEN}\n{table(rows)}\n{CLOSE}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
