"""Runs killed at seeded random moments and resumed, and strange inputs by the ten thousand.

    python -m tests.robustness.torture --kills 12 --kinds lora reference ddp zero2 fsdp2 \
        --cases 50000 --out bench/results/torture.json

After every kill each checkpoint must be whole, and every run that gets to its end must have the
weights and the mean loss of the one never stopped: bit for bit on one process, within 1e-6 on two.
A case is rows and settings (`tests/support/fuzzing.py`) or spoilt files (`spoilt_files.py`), and
must end well or in one of our errors.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from bench.lib.record import Row, environment, find_commit, refused, writer
from tests.robustness.killed_runs import Moment, run

ENGINES = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
PHASES = ("step", "save", "evaluate")
BOUNDS = {1: 0.0, 2: 1e-6}
"""How far weights and loss may be from the uninterrupted run's, by the number of processes."""

KINDS: dict[str, tuple[int, str]] = {
    "plain": (1, ""),
    "lora": (1, "use_peft: true, lora_r: 4, eval_steps: 2, load_best_model_at_end: true"),
    "reference": (1, "objective: dpo, precompute_ref_log_probs: true"),
    "ddp": (2, ""),
    "zero2": (2, "deepspeed: zero2.json"),
    "fsdp2": (2, ""),
}
"""Kinds of runs: how many processes, and settings beside `SETTINGS`."""

PIECE = 1000
PIECE_TIMEOUT_S = 3600
"""Cases of one kind, seed and process, and how long they may take: longer is a hang."""

SHARES = {
    "rows": 0.46, "edges": 0.2, "yaml": 0.1, "runs": 0.1, "answers": 0.1, "models": 0.02,
    "data": 0.02,
}  # fmt: skip
"""Of the cases: rows and settings (`fuzzing`), and files of each kind (`spoilt_files`)."""

SETTINGS = """\
{model_name_or_path: ./model, dataset: train.jsonl, eval_dataset: test.jsonl, objective: lmpo,
 optim: adamw_torch, learning_rate: 0.001, lr_scheduler_type: cosine, max_steps: 8,
 gradient_accumulation_steps: 2, eval_strategy: steps, eval_steps: 3, save_steps: 2,
 save_total_limit: 2, logging_steps: 4, use_cpu: true, disable_tqdm: true, report_to: none,
 resume_from_checkpoint: auto}
"""


def runnable() -> list[str]:
    """The kinds that what is installed here can run."""
    return [kind for kind in KINDS if kind != "zero2" or find_spec("deepspeed")]


def prepare(place: Path) -> None:
    """A tiny model and pairs for it."""
    from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs

    tiny_model().save_pretrained(place / "model")
    TOKENIZER.save_pretrained(place / "model")
    tiny_pairs(13).to_json(place / "train.jsonl")
    tiny_pairs(5, seed=1).to_json(place / "test.jsonl")
    shutil.copy(ENGINES / "deepspeed_zero2.json", place / "zero2.json")
    for kind, (ranks, more) in KINDS.items():
        settings = yaml.safe_load(SETTINGS) | (yaml.safe_load(f"{{{more}}}") or {})
        settings["per_device_train_batch_size"] = 4 // ranks
        settings["ddp_backend"] = None if ranks == 1 else "gloo"
        (place / f"config-{kind}.yaml").write_text(yaml.safe_dump(settings))


def apart(one: Path, two: Path) -> float:
    """The largest difference of two models' weights; 0 just if they are equal bit for bit."""
    from safetensors.torch import load_file

    first, second = (load_file(next(path.glob("*model.safetensors"))) for path in (one, two))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def record_apart(one: Path, two: Path, most_seconds: float) -> float:
    """How far the mean losses of two ended runs are from each other.

    Raises:
        AssertionError: the records of ``one`` do not tell of a complete run of up to that long.
    """
    run, other = (json.loads((path / "run.json").read_text())["summary"] for path in (one, two))
    state = json.loads((one / "trainer_state.json").read_text())
    assert run["steps"] == other["steps"] == state["global_step"]
    assert 0 < run["train_seconds"] <= most_seconds, (run["train_seconds"], most_seconds)
    steps = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert steps == sorted(set(steps)), "every step is logged once"
    assert (one / "report.html").stat().st_size > 10_000
    return abs(run["train_loss"] - other["train_loss"])


def torture(place: Path, kind: str, kills: int, seed: int) -> Row:
    """Kill and resume; what came of it.

    Raises:
        SystemExit: a broken checkpoint, a run that fails by itself or hangs, other weights.
    """
    from widemargin.trainer.checkpoint.files import newest_complete

    started = time.monotonic()
    generator = random.Random(f"{kind}-{seed}")
    ranks, _ = KINDS[kind]
    uninterrupted, folder = place / "uninterrupted", place / "run-0"
    assert run(place, uninterrupted, kind, ranks, None)
    began = time.monotonic()
    done, finished, resumed, worst = 0, 0, 0, 0.0
    seen: Counter[str] = Counter()
    while True:
        phase = PHASES[done % len(PHASES)]
        most = {"step": 16, "save": 30, "evaluate": 5}[phase]
        moment = Moment(
            phase, generator.randint(1, most), generator.randrange(ranks),
            generator.choice([0.0, 0.0005, 0.003]),
        )  # fmt: skip
        resumed += newest_complete(folder)[0] is not None
        ended = run(place, folder, kind, ranks, moment if done < kills else None)
        if not ended:
            done += 1
            seen[phase] += 1
            broken = newest_complete(folder)[1]
            if broken:
                raise SystemExit(f"after {moment}: {broken}")
            continue
        finished += 1
        worst = max(worst, apart(folder, uninterrupted))
        worst = max(worst, record_apart(folder, uninterrupted, time.monotonic() - began))
        if worst > BOUNDS[ranks]:
            raise SystemExit(f"{folder}: differs by {worst:.3g} from {uninterrupted}")
        if done >= kills:
            break
        folder, began = place / f"run-{finished}", time.monotonic()
    return {
        "case": "kill", "kind": kind, "ranks": ranks, "seed": seed, "kills": done,
        "killed_in": dict(seen),
        "starts_from_a_checkpoint": resumed, "runs_to_the_end": finished,
        "largest_difference": worst, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def use_cache(folder: Path) -> None:
    """For prepared data, in this process."""
    config: Any = importlib.import_module("datasets.config")
    config.HF_DATASETS_CACHE = folder


def tortured(kind: str, kills: int, seed: int) -> Row:
    """`torture` in a folder of its own, with the imports done that the forks share."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        use_cache(place / "cache")
        importlib.import_module("widemargin.trainer.train")
        preparing = os.fork()  # this process starts no threads, which a fork would lack
        if not preparing:
            prepare(place)
            os._exit(0)
        assert os.waitpid(preparing, 0)[1] == 0
        return torture(place, kind, kills, seed)


def try_cases(kind: str, count: int, seed: int) -> Counter[str]:
    """A piece of the cases of a kind, in a process of its own; ends by what became of them.

    Raises:
        RuntimeError: a finding, with the case and its traceback as text, since not every library's
            exception travels between processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        use_cache(Path(folder) / "cache")  # which cases of data clear
        try:
            from tests.support import fuzzing, spoilt_files

            if kind == "rows":
                return fuzzing.search(count, seed, Path(folder))
            return spoilt_files.search(kind, count, seed, Path(folder))
        except BaseException:
            raise RuntimeError(traceback.format_exc()) from None


def fuzz(cases: int, seed: int, processes: int) -> Row:
    """Try ``cases`` of them in pieces, each of the next seed; what became of them."""
    started = time.monotonic()
    pieces = [
        (kind, min(PIECE, count - first), seed + first // PIECE)
        for kind, count in ((kind, round(cases * share)) for kind, share in SHARES.items())
        for first in range(0, count, PIECE)
    ]
    context = multiprocessing.get_context("spawn")
    outcomes: Counter[str] = Counter()
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
        limit = PIECE_TIMEOUT_S * len(pieces)
        for (kind, *_), counts in zip(
            pieces, pool.map(try_cases, *zip(*pieces, strict=True), timeout=limit), strict=True
        ):
            outcomes += Counter({f"{kind} {name}": count for name, count in counts.items()})
    return {
        "case": "fuzz", "seed": seed, "cases": outcomes.total(),
        "outcomes": dict(outcomes), "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def described(row: Row) -> str:
    if row["case"] == "fuzz":
        outcomes = ", ".join(f"{count:,} {name}" for name, count in row["outcomes"].items())
        return f"{row['cases']:,} cases without a finding ({outcomes})"
    counts = ", ".join(f"{row['killed_in'].get(phase, 0)} in {phase}" for phase in PHASES)
    return (
        f"{row['kind']}: {row['kills']} kills on {row['ranks']} process(es) ({counts}), "
        f"{row['starts_from_a_checkpoint']} starts from a checkpoint; {row['runs_to_the_end']} "
        f"runs came to their end, weights and loss at most {row['largest_difference']:.3g} from "
        "those of the uninterrupted run"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=12, help="per kind of run")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=runnable())
    parser.add_argument("--cases", type=int, default=0, help="of strange rows and settings")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="for the cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    options = parser.parse_args()
    commit = find_commit()
    if options.out is not None and refused(options.out, commit):
        return 2
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    facts = {"op": "torture", **environment("cpu", commit)}
    rows: list[Row] = []
    for kind in options.kinds if options.kills else ():
        rows.append({**facts, **tortured(kind, options.kills, options.seed)})
        print(described(rows[-1]), flush=True)
    if options.cases:
        rows.append({**facts, **fuzz(options.cases, options.seed, options.processes)})
        print(described(rows[-1]), flush=True)
    if options.out is not None:
        writer(options.out)(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
