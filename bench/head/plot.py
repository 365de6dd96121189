"""Pictures of the head's benchmark: time, memory, and gradient error against the work done."""

import itertools
import math
from pathlib import Path
from typing import Any

from widemargin.kernels.linear_logprob import TAIL_EPS, TRAINING_TAIL_EPS

from bench.head.providers import BASELINE
from bench.lib.plots import bars, colour, label, new_figure, save
from bench.lib.record import Row


def draw(rows: list[Row], path: Path) -> None:
    """Forward and backward of each provider, its memory, and, where counted, error against work.

    Args:
        rows: of one case on one device; providers that were not timed are left out.
    """
    timed = [row for row in rows if "total_ms" in row]
    timed.sort(key=lambda row: row["total_ms"]["median"])
    ratios = (1.25, 1, 1.15) if any("passes" in row for row in timed) else (1.25, 1)
    height = 1.2 + 0.27 * max(len(timed), 6)
    figure, axes = new_figure(1, len(ratios), height, width_ratios=ratios)
    _times(axes[0][0], timed)
    _memory(axes[0][1], timed)
    if len(ratios) == 3:
        _errors(axes[0][2], timed)
    figure.suptitle(title(rows[0]), fontsize=9, x=0.01, ha="left")
    save(figure, path)


def title(row: Row) -> str:
    return (
        f"Head, case {row['case']} ({row['distribution']}): {row['tokens']:,} tokens, hidden "
        f"{row['hidden_size']:,}, vocabulary {row['vocab']:,}, {row['dtype']}; {row['device_name']}"
    )


def _times(panel: Any, rows: list[Row]) -> None:
    """Stacked bars, the baseline's ratio behind each, and the time of one bare product."""
    names = [label(row["provider"]) for row in rows]
    colours = [colour(row["provider"]) for row in rows]
    forward = [row["forward_ms"]["median"] for row in rows]
    backward = [row["backward_ms"]["median"] for row in rows]
    panel.barh(names, forward, color=colours)
    tops = panel.barh(
        names, backward, left=forward, color=colours, alpha=0.45, hatch="///", edgecolor="white"
    )
    ratios = [f"{r['speedup']['total']:.2f}×" if "speedup" in r else "" for r in rows]
    panel.bar_label(tops, ratios, padding=3, fontsize=8)
    product = rows[0]["product_ms"]["median"]
    panel.axvline(product, color="black", linewidth=1, linestyle="--")
    panel.text(
        product, 1.0, "one product", transform=panel.get_xaxis_transform(), fontsize=7.5,
        ha="center", va="bottom",
    )  # fmt: skip
    panel.margins(x=0.14)
    panel.invert_yaxis()
    panel.set_xlabel("ms: forward (solid), backward (hatched)")
    panel.set_title(f"Time (× {BASELINE})", loc="left", pad=14)


def _memory(panel: Any, rows: list[Row]) -> None:
    peaks = [row.get("peak_extra_mib", {}).get("allocator", 0) for row in rows]
    bars(panel, rows, peaks)
    panel.margins(x=0.16)
    panel.set_yticklabels([])
    panel.set_xlabel("MiB beyond inputs and gradients")
    panel.set_title("Peak memory", loc="left", pad=14)


def _errors(panel: Any, rows: list[Row]) -> None:
    """Error of dH against passes: further left is less work, further down more exact."""
    for row, marker in zip(rows, itertools.cycle("osD^vPX"), strict=False):
        if "passes" in row:
            panel.plot(
                row["passes"], row["errors"]["dhidden"], marker, markersize=8,
                color=colour(row["provider"]), label=label(row["provider"]), alpha=0.9,
            )  # fmt: skip
    panel.axvline(1, color="black", linewidth=1, linestyle="--")
    panel.set(yscale="log", xlim=(0.8, None))
    panel.grid(alpha=0.3)
    panel.set_xlabel("work, passes of 2·N·H·V operations")
    panel.set_ylabel("relative error of dH")
    panel.set_title("Error of dH against fp64", loc="left", pad=14)
    panel.legend(loc="upper right", fontsize=7)


def draw_active(rows: list[Row], path: Path) -> None:
    """Error of dH against the backward's passes, a curve per case and form."""
    figure, ((axes,),) = new_figure(1, 1, 4.6)
    for index, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        for form, style in (("pairs", "o-"), ("cells", "s--")):
            curve = [row for row in rows if row["case"] == case and row["form"] == form]
            axes.plot(
                [row["backward_passes"] for row in curve],
                [row["errors"]["dhidden"] for row in curve],
                style,
                color=f"C{index}",
                label=f"{case} ({curve[0]['entropy']:.1f} nats), {form}",
            )
            for eps, marker in ((TAIL_EPS, "k*"), (TRAINING_TAIL_EPS, "kD")):
                default = next(row for row in curve if row["tail_eps"] == eps)
                place = default["backward_passes"], default["errors"]["dhidden"]
                axes.plot(*place, marker, markersize=11 if eps == TAIL_EPS else 5)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="backward: passes of [N, H] x [H, V] (full logits: 2, chunked heads: 3)",
        ylabel="relative error of dH against fp64",
    )
    least, most = (
        round(math.log2(choose(row["tail_eps"] for row in rows))) for choose in (min, max)
    )
    axes.set_title(
        f"Work against gradient error, tail_eps from 2^{least} to 2^{most}\n"
        "(stars: the op's default, diamonds: the trainer's)",
        loc="left",
    )
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    save(figure, path)
