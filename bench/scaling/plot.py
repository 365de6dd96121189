"""Pictures of the scaling curves."""

from pathlib import Path
from typing import Any

from bench.lib.plots import colour, lines, new_figure, save
from bench.lib.record import Row
from bench.scaling.curves import SIZES, crossover


def draw(rows: list[Row], path: Path) -> None:
    """The curves of sizes, or all others, as the first row is one or the other."""
    (_draw_sizes if rows[0]["curve"] in SIZES else _draw_rest)(rows, path)


def _draw_sizes(rows: list[Row], path: Path) -> None:
    """Time and memory of each head against N, V and H, two lines of three panels."""
    timed = [row for row in rows if row["curve"] in SIZES and "total_ms" in row]
    figure, axes = new_figure(2, len(SIZES), 5.2, sharey="row")
    for column, curve in enumerate(SIZES):
        here = [row for row in timed if row["curve"] == curve]
        lines(axes[0][column], here, curve, _milliseconds)
        lines(axes[1][column], here, curve, _peak_mib)
        ticks = sorted({row[curve] for row in here})
        for panel in (axes[0][column], axes[1][column]):
            _log_log(panel, ticks)
            panel.set_xlabel(SIZES[curve])
        fixed = ", ".join(
            f"{SIZES[other][-1]} {here[0][other]:,}" for other in SIZES if other != curve and here
        )
        axes[0][column].set_title(f"{SIZES[curve]} varied ({fixed})", loc="left")
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[1][0].set_ylabel("peak memory, MiB")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[1]))
    save(figure, path)


def _milliseconds(row: Row) -> float:
    return row["total_ms"]["median"]


def _peak_mib(row: Row) -> float | None:
    return row.get("peak_extra_mib", {}).get("allocator")


def _draw_rest(rows: list[Row], path: Path) -> None:
    """The head against the active fraction, whole steps against length, pairs/s against ranks;
    curves that were not measured are left out."""
    curves = {row["curve"] for row in rows if "reason" not in row}
    known = [("active", _active), ("sequence", _steps), ("sequence", _memory), ("ranks", _ranks)]
    panels = [draw for curve, draw in known if curve in curves]
    figure, axes = new_figure((len(panels) + 1) // 2, 2, 3.1 * ((len(panels) + 1) // 2))
    flat = list(axes.flat)
    for panel, draw in zip(flat, panels, strict=False):
        draw(panel, rows)
    for unused in flat[len(panels) :]:
        unused.remove()
    save(figure, path)


def _active(panel: Any, rows: list[Row]) -> None:
    """Time of tail "mean" against what routing leaves, "exact" beside it, and where they meet."""
    timed = [row for row in rows if row["curve"] == "active" and "total_ms" in row]
    for kind in ("mean", "exact"):
        mine = sorted(
            (row for row in timed if row["provider"].endswith(kind)),
            key=lambda row: row["active_fraction"],
        )
        if not mine:
            continue
        name = mine[0]["provider"]
        times = [row["total_ms"]["median"] for row in mine]
        if kind == "mean":
            at = [row["active_fraction"] for row in mine]
            panel.plot(at, times, "o-", color=colour(name), label="tail mean", markersize=4)
            continue
        median = sorted(times)[len(times) // 2]
        panel.axhspan(min(times), max(times), color=colour(name), alpha=0.25)
        panel.axhline(median, color=colour(name), label="tail exact (band: all cases)")
    product = timed[0]["product_ms"]["median"]
    panel.axhline(product, color="black", linewidth=1, linestyle="--", label="one product")
    if (at := crossover(timed)) is not None:
        panel.axvline(at, color="crimson", linewidth=1, linestyle=":")
        panel.text(at, 0.04, f" meet at {at:.2f}", transform=panel.get_xaxis_transform(),
                   color="crimson", fontsize=8, ha="right" if at > 0.6 else "left")  # fmt: skip
    panel.set(xlim=(0, 1.02), ylim=(0, None), xlabel="active fraction of (token, block) pairs")
    panel.set_ylabel("forward + backward, ms")
    panel.set_title("Head: from sparse to dense", loc="left")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left", bbox_to_anchor=(0, 0.9))


def _steps(panel: Any, rows: list[Row]) -> None:
    case = _against_length(panel, rows, lambda row: _milliseconds(row) / 1000)
    panel.set_ylabel("forward + backward, s")
    panel.set_title(f"Decoder and head against length ({case})", loc="left")


def _memory(panel: Any, rows: list[Row]) -> None:
    case = _against_length(panel, rows, _peak_mib)
    panel.set_ylabel("peak memory beyond gradients, MiB")
    panel.set_title(f"Memory against length ({case})", loc="left")


def _against_length(panel: Any, rows: list[Row], value: Any) -> str:
    """Draw the curves; the case they are of."""
    timed = [row for row in rows if row["curve"] == "sequence" and "total_ms" in row]
    lines(panel, timed, "length", value, {"full-logits": "full logits, padded"})
    panel.set(ylim=(0, None), xlabel="tokens of a chosen sequence, prompt included")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left")
    return f"{timed[0]['case']}, {timed[0]['pairs']} pairs"


def _ranks(panel: Any, rows: list[Row]) -> None:
    rated = [row for row in rows if row["curve"] == "ranks" and "pairs_per_s" in row]
    for index, case in enumerate(dict.fromkeys(row["case"] for row in rated)):
        for kind, style in (("plan", "o--"), ("measured", "D")):
            mine = [r for r in rated if r["case"] == case and r["provider"] == kind]
            if not mine:
                continue
            rates = [row["pairs_per_s"] for row in mine]
            text = f"{case}: " + ("plan's model" if kind == "plan" else "measured, this CPU")
            tint = "crimson" if kind == "measured" else ("#084594", "#636363")[index % 2]
            panel.plot(
                [row["ranks"] for row in mine], rates, style, color=tint, label=text, markersize=5
            )
    _log_log(panel, sorted({row["ranks"] for row in rated}))
    panel.set(xlabel="ranks", ylabel="pairs per second")
    panel.set_title("Pairs/s against ranks", loc="left")
    panel.legend(loc="upper left")


def _log_log(panel: Any, ticks: list[int]) -> None:
    panel.set(xscale="log", yscale="log")
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
