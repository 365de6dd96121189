"""Benchmark what happens to pairs before the first step: tokenizing them, and planning batches.

`python -m bench.planning` from the repository root, in three parts, each job in a process of its
own with an empty cache:

- *prepare*: pairs of real answers (a seeded sample, each made different) from text to batches that
  are ready to be collated: tokenized and planned here, prepared by TRL's trainers there. Imports,
  reading the file and loading the model do not count; of TRL, only the time inside `Dataset.map`
  while the trainer is built. Contenders take turns.
- *million*: planning an epoch of one million pairs, lengths drawn from the real ones.
- *balance*: on the real lengths, for 8 ranks with 16 pairs each per step.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from bench.lib.record import Row, add_output_options, destination, environment, writer
from bench.lib.subject import fill_in
from bench.lib.timing import spread
from bench.lib.workers import WorkerError, answer_of
from bench.planning.jobs import PAIRS_PER_RANK, PREPARERS, RANKS, Spec, balance
from bench.planning.table import table
from bench.training.data import read_pairs


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.planning", description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="its tokenizer (default: `bench/lib/subject.py`)"
    )
    parser.add_argument("--pairs", type=Path, help="JSONL of pairs (default: the model's)")
    parser.add_argument("--count", type=int, default=10_000, help="pairs to prepare")
    parser.add_argument("--lengths", type=int, default=1_000_000, help="lengths to plan")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--providers", nargs="+", choices=PREPARERS, default=list(PREPARERS))
    parser.add_argument("--processes", type=int, help="of Dataset.map (default: each one's own)")
    add_output_options(parser, "planning.json")
    return parser.parse_args(arguments)


def sample(source: Path, count: int, seed: int = 0) -> list[Row]:
    """Pairs drawn with replacement; the number before the question makes them differ."""
    generator = random.Random(seed)
    pairs = read_pairs(source)
    rows = []
    for number in range(count):
        row = generator.choice(pairs)
        first, *others = row["prompt"]
        prompt = [first | {"content": f"{number}. {first['content']}"}, *others]
        rows.append(row | {"prompt": prompt})
    return rows


def run_alone(spec: Spec, folder: Path) -> Row:
    """The job in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        (Path(cache) / "spec.json").write_text(json.dumps(spec | {"folder": cache}))
        variables = {
            "HF_HOME": cache, "HF_DATASETS_CACHE": f"{cache}/datasets", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
        }  # fmt: skip
        try:
            return answer_of("bench.planning.jobs", f"{cache}/spec.json", variables=variables)
        except WorkerError as error:
            return {"reason": str(error)}


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    rows_file = folder / "rows.jsonl"
    fill_in(options, folder)
    pairs = sample(options.pairs, options.count)
    rows_file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    common = {
        "rows": str(rows_file), "model": str(options.model.resolve()),
        "max_length": options.max_length, "processes": options.processes,
        "lengths_file": str(folder / "lengths.npy"), "lengths": options.lengths,
    }  # fmt: skip
    runs: dict[str, list[Row]] = {name: [] for name in options.providers}
    for turn in range(options.repeats):
        shift = turn % len(runs)
        for name in [*runs][shift:] + [*runs][:shift]:
            runs[name].append(run_alone(common | PREPARERS[name], folder))
    rows = [{"case": "prepare", "provider": n, **_of_runs(many)} for n, many in runs.items()]
    theirs = [
        row["seconds"]["median"]
        for row in rows
        if row["provider"] != "widemargin" and "seconds" in row
    ]
    for row in rows:
        if theirs and "seconds" in row:
            row["speedup"] = round(min(theirs) / row["seconds"]["median"], 3)
    ours: list[Row] = []
    if Path(common["lengths_file"]).is_file():
        ours.append({"case": "million", **run_alone(common | {"job": "million"}, folder)})
        ours += [{"case": "balance", **row} for row in balance(common["lengths_file"])]
    return rows + [{"provider": "widemargin", **row} for row in ours]


def _of_runs(runs: list[Row]) -> Row:
    failed = next((run for run in runs if "reason" in run), None)
    if failed:
        return failed
    row: Row = {"pairs": runs[0]["pairs"], "seconds": spread([run["seconds"] for run in runs])}
    for name in ("planning_s", "peak_extra_mib"):
        if name in runs[0]:
            row[name] = round(statistics.median(run[name] for run in runs), 3)
    return row


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out, commit = destination(options, "planning.json")
    facts = {
        "op": "planning", "max_length": options.max_length, "processes": options.processes,
        "ranks": RANKS, "pairs_per_rank": PAIRS_PER_RANK,
        **environment("cpu", commit),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    facts["data"] = options.pairs.name
    rows = [{**facts, **row} for row in rows]
    writer(out)(rows)
    print(table(rows))
    return 1 if any("reason" in row for row in rows if row["provider"] == "widemargin") else 0
