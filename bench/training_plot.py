"""A picture of whole training steps: speed, tokens and memory per trainer, and their losses."""

from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLOURS = {
    "widemargin-padded": "#9ecae1",
    "widemargin-packed": "#4292c6",
    "widemargin-prefix_shared": "#084594",
}
OTHER = "#d95f02"
PANELS = (
    ("pairs_per_s", "pairs per second", 1.0),
    ("tokens_per_step", "decoder tokens a step", 1.0),
    ("peak_mib", "peak memory, GiB", 1 / 1024),
)


def draw(rows: list[Row], path: Path) -> None:
    """One line of panels per case; trainers that could not run are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = _cases([row for row in rows if "pairs_per_s" in row])
    figure, axes = pyplot.subplots(
        len(cases), 4, figsize=(15, 3.2 * len(cases)), squeeze=False, layout="constrained"
    )
    for line, (title, found) in zip(axes, cases.items(), strict=True):
        for panel, (key, label, scale) in zip(line, PANELS, strict=False):
            _bars(panel, found, key, label, scale)
        _losses(line[3], found)
        line[0].set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _cases(rows: list[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        prompts = "long prompts" if row["long_prompts"] else "short prompts"
        title = f"{row['case']}, {row['objective']}, {row['attention']}, {prompts}"
        cases.setdefault(title, []).append(row)
    return cases


def _bars(panel: Any, rows: list[Row], key: str, label: str, scale: float) -> None:
    names = [row["provider"].removeprefix("widemargin-") for row in rows]
    values = [row[key] * scale for row in rows]
    bars = panel.barh(names, values, color=[COLOURS.get(r["provider"], OTHER) for r in rows])
    panel.bar_label(bars, fmt="%.2f" if max(values) < 100 else "%.0f", padding=3, fontsize=8)
    panel.margins(x=0.18)
    panel.invert_yaxis()
    panel.set_xlabel(label)
    panel.spines[["top", "right"]].set_visible(False)


def _losses(panel: Any, rows: list[Row]) -> None:
    """Curves that lie on each other are the same work; thinner ones are drawn over wider ones."""
    for i, row in enumerate(rows):
        panel.plot(
            range(1, len(row["losses"]) + 1),
            row["losses"],
            color=COLOURS.get(row["provider"], OTHER),
            linewidth=2 * (len(rows) - i),
            alpha=0.8,
        )
    panel.set_xlabel("step")
    panel.set_ylabel("loss (all trainers)")
    panel.spines[["top", "right"]].set_visible(False)
