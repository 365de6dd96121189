"""One look for all plots: a provider has the same colour in every picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.lib.record import Row

OURS = {"exact": "#9ecae1", "drop": "#4292c6", "mean": "#084594"}
COLOURS = {
    "full-logits": "#636363",
    **{f"widemargin-{kind}-{t}": c for kind in ("torch", "triton") for t, c in OURS.items()},
    "widemargin-triton-mean-tma": "#2171b5",
    "widemargin-triton-mean-cublas": "#6baed6",
    "widemargin-padded": "#9ecae1",
    "widemargin-packed": "#4292c6",
    "widemargin-prefix_shared": "#084594",
    "widemargin": "#084594",
    "torch-linear-cross-entropy": "#e6550d",
    "trl-chunked": "#d6a400",
    "trl-cpo": "#d6a400",
    "trl-dpo": "#d6a400",
    "trl-dpo-our-head": "#8c6bb1",
    "liger-simpo": "#31a354",
    "liger-ce": "#74c476",
    "liger-ce-mean": "#a1d99b",
    "liger-scaled-ce": "#006d2c",
    "cut-cross-entropy": "#ae017e",
    "cut-cross-entropy-exact": "#f768a1",
}
OTHER = "#bdbdbd"
WIDTH_IN = 11
"""Of a picture that a page shows at its full width: text of 9 points is then still readable."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def colour(provider: str) -> str:
    return COLOURS.get(provider, OTHER)


def label(provider: str) -> str:
    """A provider's name as pictures show it: ours without the package's and the backend's."""
    ours = provider.removeprefix("widemargin-")
    if ours == provider:
        return provider
    return "ours " + ours.removeprefix("torch-").removeprefix("triton-")


def new_figure(rows: int, columns: int, height_in: float, **kwargs: Any) -> tuple[Any, Any]:
    """(figure, axes [rows][columns]) in the common style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(STYLE)
    size = (WIDTH_IN, height_in)
    return pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", **kwargs
    )


def bars(panel: Any, rows: list[Row], values: list[float], number: str = "%.0f") -> None:
    """A bar with its number for each row's provider, the first on top."""
    names = [label(row["provider"]) for row in rows]
    drawn = panel.barh(names, values, color=[colour(row["provider"]) for row in rows])
    panel.bar_label(drawn, fmt=number, padding=3, fontsize=8)
    panel.invert_yaxis()


def lines(
    panel: Any,
    rows: list[Row],
    key: str,
    value: Callable[[Row], float | None],
    names: dict[str, str] | None = None,
) -> None:
    """A curve of ``value`` against ``key`` for each provider; ``names`` where labels differ."""
    for provider in dict.fromkeys(row["provider"] for row in rows):
        mine = [row for row in rows if row["provider"] == provider]
        panel.plot(
            *([row[key] for row in mine], [value(row) for row in mine], "o-"),
            color=colour(provider),
            label=(names or {}).get(provider) or label(provider),
            markersize=4,
        )


def save(figure: Any, path: Path) -> None:
    """As a PNG whose bytes depend on the drawing alone."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
