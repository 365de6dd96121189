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
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.lib.memory import status_bytes
from bench.lib.record import ROOT, Row, add_output_options, destination, environment, writer
from bench.lib.subject import fill_in
from bench.lib.timing import spread
from bench.report import tables as page_tables
from bench.training.data import read_pairs

RANKS, PAIRS_PER_RANK = 8, 16
Spec = dict[str, Any]


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


def ours(spec: Spec, rows: Any, tokenizer: Any) -> Row:
    """Tokenized by our settings, and one epoch planned."""
    from widemargin.trainer.batching.planner import Planner
    from widemargin.trainer.data import DataSettings, tokenize_pairs
    from widemargin.trainer.data.table import PairRows

    settings = DataSettings(max_length=spec["max_length"])
    if spec["processes"] is not None:
        settings.preprocessing_num_workers = spec["processes"]
    begin = time.perf_counter()
    tokenized, _ = tokenize_pairs(rows, tokenizer, settings)
    mapped = time.perf_counter()
    lengths = PairRows(tokenized).lengths
    plan = Planner(lengths, RANKS * PAIRS_PER_RANK, 1, RANKS).plan(0)
    end = time.perf_counter()
    np.save(spec["lengths_file"], np.stack([lengths.prompt, lengths.chosen, lengths.rejected]))
    return {"seconds": end - begin, "planning_s": end - mapped, "pairs": len(plan.order)}


def trl(spec: Spec, rows: Any, tokenizer: Any) -> Row:
    """What a TRL trainer does to the same rows while it is built."""
    import importlib

    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    module = importlib.import_module({"CPO": "trl.experimental.cpo", "DPO": "trl"}[spec["kind"]])
    config = getattr(module, f"{spec['kind']}Config")(
        output_dir=spec["folder"], report_to="none", use_cpu=True, bf16=False,
        max_length=spec["max_length"], dataset_num_proc=spec["processes"], disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(spec["model"])
    whole, spent = Dataset.map, []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return whole(self, *args, **kwargs)
        finally:
            spent.append(time.perf_counter() - begin)

    Dataset.map = timed
    trainer = getattr(module, f"{spec['kind']}Trainer")(
        model, args=config, train_dataset=rows, processing_class=tokenizer
    )
    return {"seconds": sum(spent), "pairs": len(trainer.train_dataset)}


PREPARERS: dict[str, Spec] = {
    "widemargin": {"job": "ours"},
    "trl-dpo": {"job": "trl", "kind": "DPO"},
    "trl-cpo": {"job": "trl", "kind": "CPO"},
}


def prepare(spec: Spec) -> Row:
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer

    disable_progress_bars()
    rows: Any = Dataset.from_json(spec["rows"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    before = status_bytes("VmRSS")
    found = {"ours": ours, "trl": trl}[spec["job"]](spec, rows, tokenizer)
    return found | {"peak_extra_mib": round((status_bytes("VmHWM") - before) / 2**20, 1)}


def million(spec: Spec) -> Row:
    """One epoch of many pairs, for objectives that couple pairs and for those that do not."""
    from widemargin.trainer.batching.planner import Planner
    from widemargin.trainer.data.lengths import PairLengths

    real = np.load(spec["lengths_file"])
    picked = np.random.default_rng(0).integers(0, real.shape[1], spec["lengths"])
    lengths = PairLengths(*real[:, picked])
    before, seconds = status_bytes("VmRSS"), {}
    for coupled in (True, False):
        begin = time.perf_counter()
        Planner(lengths, RANKS * PAIRS_PER_RANK, 8, RANKS, coupled=coupled).plan(0)
        seconds["coupled" if coupled else "free"] = time.perf_counter() - begin
    high = status_bytes("VmHWM")
    return {
        "pairs": spec["lengths"],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_mib": round(high / 2**20, 1),
        "peak_extra_mib": round((high - before) / 2**20, 1),
    }


def balance(lengths_file: str) -> list[Row]:
    """The largest rank over the mean: of steps (mean and worst) and of micro-batches."""
    from widemargin.trainer.batching.planner import Planner
    from widemargin.trainer.batching.summary import busiest
    from widemargin.trainer.data.lengths import PairLengths

    lengths = PairLengths(*np.load(lengths_file))
    rows = []
    for micro_batches in (1, 4, 8, 16):
        for coupled in (True, False):
            planner = Planner(
                lengths, RANKS * PAIRS_PER_RANK, micro_batches, RANKS, coupled=coupled
            )
            whole = planner.plan(0).tokens(planner.layout)[: planner.whole_steps * micro_batches]
            steps = whole.reshape(-1, micro_batches, RANKS).sum(axis=1)
            worst = (steps.max(axis=1) / steps.mean(axis=1)).max() if len(steps) else 1.0
            rows.append(
                {
                    "micro_batches": micro_batches,
                    "coupled": coupled,
                    "step": busiest(steps),
                    "worst_step": round(float(worst), 4),
                    "micro_batch": busiest(whole),
                }
            )
    return rows


def run_alone(spec: Spec, folder: Path) -> Row:
    """The job in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        (Path(cache) / "spec.json").write_text(json.dumps(spec | {"folder": cache}))
        settings = {
            "HF_HOME": cache, "HF_DATASETS_CACHE": f"{cache}/datasets", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "true",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "bench.planning", "--worker", f"{cache}/spec.json"],
            cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        return {"reason": " ".join(done.stderr.strip().splitlines()[-1:])[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    rows_file = folder / "rows.jsonl"
    fill_in(options, folder)
    rows = sample(options.pairs, options.count)
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    found = [{"case": "prepare", "provider": n, **_of_runs(many)} for n, many in runs.items()]
    theirs = [
        r["seconds"]["median"] for r in found if r["provider"] != "widemargin" and "seconds" in r
    ]
    for row in found:
        if theirs and "seconds" in row:
            row["speedup"] = round(min(theirs) / row["seconds"]["median"], 3)
    if Path(common["lengths_file"]).is_file():
        planned = run_alone(common | {"job": "million"}, folder)
        found.append({"case": "million", "provider": "widemargin", **planned})
        balanced = balance(common["lengths_file"])
        found += [{"case": "balance", "provider": "widemargin", **row} for row in balanced]
    return found


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
    print(page_tables.planning(rows))
    return 1 if any("reason" in row for row in rows if row["provider"] == "widemargin") else 0


def worker(spec_file: str) -> None:
    spec = json.loads(Path(spec_file).read_text())
    print(json.dumps(million(spec) if spec["job"] == "million" else prepare(spec)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2])
    else:
        sys.exit(main())
