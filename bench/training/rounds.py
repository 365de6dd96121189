"""Contenders' steps in rounds: one trainer in memory at a time, each step timed once a round.

A round goes through all contenders, and the next one in the opposite order, so that a machine that
grows slower is so for all. Within a round the steps differ in work, between rounds they are equal.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.lib.record import Row
from bench.lib.timing import spread
from bench.lib.workers import Worker, WorkerError
from bench.training.contenders import CONTENDERS, SHAPES, TREES
from bench.training.data import Rows

LEAST = 2
"""Steps that count in any case."""


def batch_order(rows: Rows, batch: int, micro_batches: int = 1, trees: bool = False) -> list[int]:
    """Pairs in the order of our trainer's batches, for trainers that go through rows in order."""
    from datasets import Dataset
    from widemargin.trainer.batching.pipeline import PairBatches
    from widemargin.trainer.batching.planner import Planner
    from widemargin.trainer.data.table import PairRows

    lengths = PairRows(Dataset.from_list(rows), group_by_prompt=trees).lengths
    batches = PairBatches(
        Planner(lengths, pairs_per_step=batch, micro_batches=micro_batches, seed=0)
    )
    return [i for together in batches for i in together]


def drawn_alike(rows: Rows, batch: int, micro_batches: int, order: list[int]) -> list[int]:
    """Pairs in an order that our trainer, as it draws pairs that share nothing, turns to this."""
    rearranged = np.empty(len(order), int)
    rearranged[batch_order(rows, batch, micro_batches)] = order
    return rearranged.tolist()


def specification(
    name: str, options: argparse.Namespace, folder: Path, order: list[int] | None = None
) -> dict[str, Any]:
    """What a worker is told; ``order`` is that of the pairs for trainers that draw none."""
    contender = CONTENDERS[name]
    settings = {}
    if contender["trainer"] == "ours":
        settings = {"packing": contender["packing"], "head_tail": options.head_tail}
        settings["group_by_prompt"] = contender.get("trees", False)
    return {
        "trainer": contender["trainer"],
        "our_head": options.head_tail if "our_head" in contender else None,
        "settings": settings,
        "objective": options.objective,
        "beta": 0.1 if options.objective == "dpo" else 2.5,
        "gamma_beta_ratio": 0.5,
        "model": None if options.shape else str(options.model.resolve()),
        "shape": SHAPES[options.shape] if options.shape else None,
        "rows": str(folder / "rows.json"),
        "order": order,
        "output_dir": str(folder / f"run-{name}"),
        "pairs": options.batch // options.accumulation,
        "accumulation": options.accumulation,
        "steps": options.steps + options.warmup,
        "max_length": options.max_length,
        **{
            key: getattr(options, key)
            for key in ("device", "dtype", "attention", "optimizer", "checkpointing", "lora")
        },
        "learning_rate": options.learning_rate,
    }


def start(name: str, spec: dict[str, Any], folder: Path, **variables: str) -> Worker:
    """A contender's process, which takes one step for every "step" it is told."""
    return Worker("bench.training.worker", name, spec, folder, **variables)


def run_contenders(
    names: list[str], options: argparse.Namespace, folder: Path, rows: Rows
) -> dict[str, Row]:
    """Facts by name: times and losses, or the ``reason`` why there are none."""
    size = (options.batch, options.accumulation)
    order = batch_order(rows, *size, options.trees)
    drawn = drawn_alike(rows, *size, order) if options.trees else None
    records: dict[str, list[Row]] = {name: [] for name in names}
    reasons: dict[str, str] = {}
    steps, budget_s = options.steps, options.budget_s / (options.rounds * len(names))
    for turn in range(options.rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            if name in reasons:
                continue
            given = drawn if CONTENDERS[name]["trainer"] == "ours" else order
            spec = specification(name, options, folder, None if name == TREES else given)
            worker = start(name, spec, folder)
            try:
                records[name].append(train(worker, options.warmup, steps, budget_s, spec["steps"]))
            except WorkerError as error:
                reasons[name] = str(error)
                continue
            finally:
                worker.stop()
            steps = len(records[name][-1]["losses"]) - options.warmup
    return {
        name: {"reason": reasons[name]} if name in reasons else facts(found, steps, options)
        for name, found in records.items()
    }


def train(worker: Worker, warmup: int, steps: int, budget_s: float, last: int) -> Row:
    """``steps`` after those that warm up, fewer where the budget is spent.

    The trainer would end by itself after step ``last``.
    """
    start_mib = worker.answer()["peak_mib"]
    taken: list[dict[str, Any]] = []
    begin = time.monotonic()
    while len(taken) < warmup + steps:
        if len(taken) >= warmup + LEAST and time.monotonic() - begin > budget_s:
            break
        worker.tell("step")
        taken.append(worker.answer())
    if len(taken) < last:
        worker.tell("stop")
    return {"start_mib": start_mib, "taken": taken, **worker.answer()}


def second_fastest(times: tuple[float, ...]) -> float:
    """What confirms the fastest; alone, a slow round among three says nothing against it."""
    return sorted(times)[:2][-1]


def facts(records: list[Row], steps: int, options: argparse.Namespace) -> Row:
    """Of the first ``steps`` that count, which every contender took in each of its rounds."""
    counted = slice(options.warmup, options.warmup + steps)
    rounds = [[step["ms"] for step in record["taken"][counted]] for record in records]
    fastest = [min(times) for times in zip(*rounds, strict=True)]
    tokens = [step["tokens"] for step in records[0]["taken"][counted]]
    apart = [second_fastest(times) / min(times) - 1 for times in zip(*rounds, strict=True)]
    return {
        "steps": steps,
        "rounds": len(rounds),
        "step_ms": spread(fastest),
        **({"spread": round(max(apart), 3)} if len(rounds) > 1 else {}),
        "pairs_per_s": round(options.batch * steps / (sum(fastest) / 1000), 4),
        "tokens_per_step": round(sum(tokens) / steps, 1),
        "start_mib": round(records[0]["start_mib"], 1),
        "peak_mib": round(max(record["peak_mib"] for record in records), 1),
        "losses": [round(loss, 6) for loss in records[0]["losses"][: counted.stop]],
    }
