"""A picture of whole training steps: speed, tokens and memory per trainer, and their losses."""

from pathlib import Path
from typing import Any

from bench.lib.plots import bars, colour, new_figure, save
from bench.lib.record import Row
from bench.training.table import variant

PANELS = (
    ("pairs_per_s", "pairs per second", 1.0),
    ("tokens_per_step", "decoder tokens a step", 1.0),
    ("peak_mib", "peak memory, GiB", 1 / 1024),
)


def draw(rows: list[Row], path: Path) -> None:
    """One line of panels per case; trainers that could not run are left out."""
    cases = _cases([row for row in rows if "pairs_per_s" in row])
    figure, axes = new_figure(len(cases), 4, 2.3 * len(cases))
    for line, (title, case) in zip(axes, cases.items(), strict=True):
        for index, (panel, (key, text, scale)) in enumerate(zip(line, PANELS, strict=False)):
            _bars(panel, case, key, text, scale)
            if index:
                panel.set_yticklabels([])
        _losses(line[3], case)
        line[0].set_title(title, loc="left")
    save(figure, path)


def _cases(rows: list[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        prompts = "long prompts" if row["long_prompts"] else "short prompts"
        title = f"{row['case']}, {row['objective']}, {row['attention']}, {prompts}{variant(row)}"
        cases.setdefault(title, []).append(row)
    return cases


def _bars(panel: Any, rows: list[Row], key: str, text: str, scale: float) -> None:
    values = [row[key] * scale for row in rows]
    bars(panel, rows, values, "%.2f" if max(values) < 100 else "%.0f")
    panel.margins(x=0.25)
    panel.set_xlabel(text)


def _losses(panel: Any, rows: list[Row]) -> None:
    """Curves that lie on each other are the same work; thinner ones are drawn over wider ones."""
    for i, row in enumerate(rows):
        panel.plot(
            range(1, len(row["losses"]) + 1),
            row["losses"],
            color=colour(row["provider"]),
            linewidth=2 * (len(rows) - i),
            alpha=0.8,
        )
    panel.set_xlabel("step")
    panel.set_ylabel("loss (all trainers)")
