"""Whole training steps as a table: `python -m bench.training_table RESULTS.json ... [--into FILE]`.

With `--into` the table replaces what stands between `<!-- table:training -->` and
`<!-- /table -->`; `--plot` draws speed, tokens and memory of each trainer, and every loss.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.table import write_into

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """Markdown: a heading per case, a line per contender."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        lengths = "/".join(str(round(n)) for n in row["mean_lengths"].values())
        heading = (
            f"{row['case']}, {row['objective']}, {row['pairs_per_step']} pairs a step, "
            f"prompt/chosen/rejected {lengths} tokens, {row['attention']}, {row['dtype']}; "
            f"{row['device_name']}; torch {row['versions']['torch']}; "
            f"{(row['commit'] or 'no commit')[:9]}"
        )
        base = next(
            (r for r in rows if r["provider"].startswith("trl") and _same_case(r, row)), None
        )
        if "reason" in row:
            line = f"| {row['provider']} | – | {row['reason'].replace('|', '/')} | – | – | – |"
        else:
            times = row["step_ms"]
            ratio = "–"
            if base and "pairs_per_s" in base:
                ratio = f"{row['pairs_per_s'] / base['pairs_per_s']:.2f}"
            line = (
                f"| {row['provider']} | {row['pairs_per_s']:.2f} | {times['median']:.0f} "
                f"({times['min']:.0f}–{times['max']:.0f}) | {ratio} | {row['tokens_per_step']:.0f} "
                f"| {row['peak_mib']:.0f} |"
            )
        groups.setdefault(heading, []).append(line)
    head = [
        "| trainer | pairs/s | step ms (min–max) | × TRL | tokens a step | peak memory MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n\n".join("\n".join([title, "", *head, *lines]) for title, lines in groups.items())


def _same_case(a: Row, b: Row) -> bool:
    keys = ("case", "long_prompts", "objective", "attention", "dtype", "pairs_per_step", "commit")
    return all(a[key] == b[key] for key in keys)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training_table", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="a Markdown file with the markers")
    parser.add_argument("--plot", type=Path, help="an image to draw, such as training.png")
    options = parser.parse_args(arguments)
    rows = [row for path in options.results for row in json.loads(path.read_text())["rows"]]
    if options.plot:
        from bench.training_plot import draw

        draw(rows, options.plot)
    if options.into:
        write_into(options.into, table(rows), "training")
    if not options.into and not options.plot:
        print(table(rows))


if __name__ == "__main__":
    main()
