"""Benchmark whole training steps: each packing against TRL, on the same pairs, batch and attention.

`python -m bench.training` from the repository root. Every contender is a trainer in a process of
its own, one after the other (`bench.training.rounds`). All see the same token ids in the same
batches, so the loss curves of contenders with the same objective must lie on each other: they are
stored and compared. In every further round they train the same steps again; the fastest time of a
step counts, and how far the next one is from it says how noisy the run was. The first steps of a
round do not count. A row has pairs/s (real time, batch fetching included), peak memory of the
process (resident on a CPU, allocated on a GPU) and the loss of each step.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

from bench.lib.noise import Load, add_option, noises, place_for
from bench.lib.record import (
    Commit,
    Row,
    add_output_options,
    destination,
    environment,
    keep_others,
    writer,
)
from bench.lib.subject import fill_in
from bench.training.contenders import CONTENDERS, SHAPES, SKIPPED, TREES
from bench.training.data import (
    PairSource,
    Rows,
    folded,
    lengths_of,
    rows_of_lengths,
    token_rows,
)
from bench.training.rounds import run_contenders
from bench.training.table import CASE, table


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="default: all for it")
    parser.add_argument("--objective", choices=("simpo", "lmpo", "dpo"), default="simpo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", type=Path, help="a saved model (default: `bench/lib/subject.py`)"
    )
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--pairs", type=Path, help="JSONL of pairs (default: the model's)")
    parser.add_argument("--lengths", type=Path, help="JSON of lengths, in place of --pairs")
    parser.add_argument("--write-lengths", type=Path, help="write the pairs' lengths, and stop")
    parser.add_argument(
        "--long-prompts", action="store_true", help="an exchange before each prompt"
    )
    parser.add_argument(
        "--trees", action="store_true", help="all pairs of each prompt, which then run as trees"
    )
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4, help="pairs per step (default 4)")
    parser.add_argument(
        "--accumulation", type=int, default=1, help="micro-batches of a step, of equal size"
    )
    parser.add_argument("--steps", type=int, default=12, help="steps that count (default 12)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before those (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="times of each step (default 3)")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=math.inf,
        help="for all steps; where it is short fewer count, but two",
    )
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--optimizer", default="adamw_torch")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--lora", action="store_true", help="train an adapter on all linear layers")
    parser.add_argument("--head-tail", choices=("mean", "exact", "drop"), default="mean")
    parser.add_argument("--append", action="store_true", help="keep --out's rows of other cases")
    add_output_options(parser, "training_<device>.json")
    add_option(parser)
    return parser.parse_args(arguments)


def find_rows(options: argparse.Namespace) -> Rows:
    count = options.batch * (options.steps + options.warmup)
    vocabulary = SHAPES[options.shape]["vocab_size"] if options.shape else 256
    if options.lengths:
        lengths = json.loads(options.lengths.read_text())
        return rows_of_lengths(lengths[:count], vocabulary)
    source = PairSource(
        options.pairs,
        options.model,
        count,
        options.max_length,
        options.long_prompts,
        by_prompt=options.trees,
    )
    rows = token_rows(source)
    return folded(rows, vocabulary) if options.shape else rows


def shared_facts(options: argparse.Namespace, rows: Rows, commit: Commit) -> Row:
    lengths = lengths_of(rows)
    means = [round(sum(side) / len(rows), 1) for side in zip(*lengths, strict=True)]
    return {
        "op": "training",
        "case": (options.shape or options.model.name) + ", by prompt" * options.trees,
        "long_prompts": options.long_prompts,
        "objective": options.objective,
        "pairs_per_step": options.batch,
        "micro_batches": options.accumulation,
        "steps": options.steps,
        "max_length": options.max_length,
        "mean_lengths": dict(zip(("prompt", "chosen", "rejected"), means, strict=True)),
        "attention": options.attention,
        "dtype": options.dtype,
        "checkpointing": options.checkpointing,
        "lora": options.lora,
        "head_tail": options.head_tail,
        "optimizer": options.optimizer,
        **environment(options.device, commit),
    }


def loss_gap(rows: list[Row]) -> float | None:
    """Largest relative difference of a step's loss between contenders that ran."""
    curves = [row["losses"] for row in rows if "losses" in row]
    if len(curves) < 2:
        return None
    return max(
        abs(a - b) / max(abs(b), 1e-9)
        for curve in curves[1:]
        for a, b in zip(curve, curves[0], strict=True)
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not (options.shape and options.lengths):  # which take neither a model nor pairs
            fill_in(options, folder)
        return benchmark(options, folder)


def benchmark(options: argparse.Namespace, folder: Path) -> int:
    if options.write_lengths:
        options.write_lengths.write_text(json.dumps(lengths_of(find_rows(options))))
        return 0
    out, commit = destination(options, f"training_{options.device}.json")
    rows = find_rows(options)
    left_out = SKIPPED[options.objective] | (set() if options.trees else {TREES})
    names = options.contenders or [n for n in CONTENDERS if n not in left_out]
    (folder / "rows.json").write_text(json.dumps(rows))
    facts = shared_facts(options, rows, commit)
    load = Load()
    outcomes = run_contenders(names, options, folder, rows)
    facts["others_load"] = round(load.others(), 3)
    new = [{**facts, "provider": name, **outcomes[name]} for name in names]
    gap = loss_gap(new)
    for row in new:
        row["largest_loss_gap"] = gap
    print(table(new))
    if gap is not None:
        print(f"\nLargest relative difference between the losses of a step: {gap:.1e}")
    spreads = {row["provider"]: row["spread"] for row in new if "spread" in row}
    noise = noises(facts["others_load"], spreads)
    place = place_for(out, noise, options.keep_noisy)
    same = (*CASE, "head_tail", "provider")  # a new row takes the place of one with all these
    kept = keep_others(place, new, same) if options.append else []
    writer(place)(kept + new)
    failed = any("reason" in row for row in new if row["provider"].startswith("wide"))
    return 1 if failed or place != out else 0
