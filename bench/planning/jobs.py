"""A job of `bench.planning` in a process of its own: `python -m bench.planning.jobs SPEC.json`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.lib.profile import status_bytes
from bench.lib.record import Row

RANKS, PAIRS_PER_RANK = 8, 16
Spec = dict[str, Any]


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
    original, spent = Dataset.map, []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
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
    facts = {"ours": ours, "trl": trl}[spec["job"]](spec, rows, tokenizer)
    return facts | {"peak_extra_mib": round((status_bytes("VmHWM") - before) / 2**20, 1)}


def million(spec: Spec) -> Row:
    """One epoch of many pairs, for objectives that couple pairs and for those that do not."""
    from widemargin.trainer.batching.planner import Planner
    from widemargin.trainer.data.table import PairLengths

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
    from widemargin.trainer.batching.run_plan import busiest
    from widemargin.trainer.data.table import PairLengths

    lengths = PairLengths(*np.load(lengths_file))
    rows = []
    for micro_batches in (1, 4, 8, 16):
        for coupled in (True, False):
            planner = Planner(
                lengths, RANKS * PAIRS_PER_RANK, micro_batches, RANKS, coupled=coupled
            )
            tokens = planner.plan(0).tokens(planner.layout)
            tokens = tokens[: planner.whole_steps * micro_batches]
            steps = tokens.reshape(-1, micro_batches, RANKS).sum(axis=1)
            worst = (steps.max(axis=1) / steps.mean(axis=1)).max() if len(steps) else 1.0
            rows.append(
                {
                    "micro_batches": micro_batches,
                    "coupled": coupled,
                    "step": busiest(steps),
                    "worst_step": round(float(worst), 4),
                    "micro_batch": busiest(tokens),
                }
            )
    return rows


JOBS = {"ours": prepare, "trl": prepare, "million": million}


if __name__ == "__main__":
    given: Spec = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(JOBS[given["job"]](given)))
