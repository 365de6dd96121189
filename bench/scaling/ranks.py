"""Pairs per second against ranks: `widemargin plan`'s model, and two processes measured.

The same steps of the same pairs by one process and by two under DDP over gloo, every process with
one thread of its own, on one machine. The model is given the one process's speed and says what
more ranks would do; the second process then shows how far that holds where two ranks share a
machine's memory and caches. For an 8B model on GPUs there is the model alone, and rows say so.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from widemargin.trainer import PreferenceConfig
from widemargin.trainer.data.table import PairLengths
from widemargin.trainer.plan.chips import Chip
from widemargin.trainer.plan.engines import shipped_engine
from widemargin.trainer.plan.estimate import read_settings
from widemargin.trainer.plan.lengths import Lengths, assumed
from widemargin.trainer.plan.scenario import Scenario
from widemargin.trainer.plan.shapes import find_config
from widemargin.trainer.plan.speed import speed_of

from bench.lib.record import ROOT, Row
from bench.lib.subject import Subject, find_subject
from bench.lib.workers import WorkerError
from bench.training.command import find_rows, parse
from bench.training.data import Rows, lengths_of
from bench.training.rounds import specification, start

PAIRS_PER_STEP = 8
WARMUP, STEPS = 1, 2
RANKS = (1, 2, 4, 8)
LLAMA = ROOT / "configs" / "train" / "lmpo-llama3-8b-instruct.yaml"
LLAMA_PAIRS = 20_000
LLAMA_LENGTHS = (190.0, 330.0, 300.0)
LLAMA_RANKS = (4, 8, 16, 32, 64)
LOOPBACK_GB_S = 1.0
"""Assumed of gloo between processes of one machine."""


def rank_rows(steps: int = STEPS, pairs_per_step: int = PAIRS_PER_STEP) -> Iterator[Row]:
    """Rows with `pairs_per_s` by `ranks`; `provider` is "measured" or "plan"."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subject = find_subject(folder)
        options = training_options(subject, steps, pairs_per_step)
        pairs = find_rows(options)
        (folder / "rows.json").write_text(json.dumps(pairs))
        shared: Row = {"curve": "ranks", "case": subject.case, "pairs_per_step": pairs_per_step}
        shared |= {"threads_per_rank": 1}
        alone = None
        for ranks in (1, 2):
            speed = measure(ranks, options, folder)
            yield shared | {"provider": "measured", "ranks": ranks, **speed}
            alone = alone or speed.get("pairs_per_s")
        if alone:
            for ranks, rate in predicted(subject, pairs, options, alone).items():
                yield shared | {"provider": "plan", "ranks": ranks, "pairs_per_s": round(rate, 3)}
    for ranks, rate in llama_on_gpus().items():
        yield {
            "curve": "ranks", "case": "llama3-8b, ZeRO-3", "provider": "plan", "ranks": ranks,
            "pairs_per_s": round(rate, 3), "mean_lengths": LLAMA_LENGTHS,
            "assumed": "A100 of 312 TFLOP/s dense at 45%, 200 GB/s within 8 GPUs, 25 beyond",
        }  # fmt: skip


def training_options(subject: Subject, steps: int, pairs_per_step: int) -> argparse.Namespace:
    """Those of `bench.training` for the same kind of steps."""
    return parse(
        [
            *("--model", str(subject.model), "--pairs", str(subject.pairs)),
            *("--batch", str(pairs_per_step), "--steps", str(steps), "--warmup", str(WARMUP)),
        ]
    )


def measure(ranks: int, options: argparse.Namespace, folder: Path) -> Row:
    """Pairs/s of so many processes, or the reason why there is none."""
    spec = specification("widemargin-prefix_shared", options, folder)
    spec["pairs"] //= ranks
    variables = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    if ranks > 1:
        spec["settings"] |= {"ddp_backend": "gloo", "ddp_timeout": 300}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    workers = []
    times = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            place = place if ranks > 1 else {}
            workers.append(start(f"{ranks}-rank-{rank}", spec, folder, **variables, **place))
        for worker in workers:
            worker.answer()  # it is ready
        for _ in range(options.warmup + options.steps):
            for worker in workers:
                worker.tell("step")
            times.append(max(worker.answer()["ms"] for worker in workers))
    except WorkerError as error:
        return {"reason": str(error)}
    finally:
        for worker in workers:
            worker.stop()
    times = times[options.warmup :]
    rate = options.batch * len(times) / sum(times) * 1000
    return {"pairs_per_s": round(rate, 4), "step_ms": round(statistics.median(times), 3)}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def predicted(
    subject: Subject, pairs: Rows, options: argparse.Namespace, alone: float
) -> dict[int, float]:
    """`plan`'s pairs/s of the same steps on more ranks, given that of one."""

    settings = PreferenceConfig(
        objective="simpo", output_dir="outputs", use_cpu=True, report_to="none",
        model_name_or_path=str(subject.model), per_device_train_batch_size=options.batch,
        packing="prefix_shared", max_length=options.max_length, attn_implementation="sdpa",
    )  # fmt: skip
    config, _ = find_config(settings, None)
    lengths = Lengths(PairLengths(*np.array(lengths_of(pairs)).T), "measured")
    now = Scenario(
        settings, config, settings.build_objective(), shipped_engine("ddp", config.hidden_size),
        1, lengths,
    )  # fmt: skip
    chip = Chip(tflops=1.0, mfu=1.0, node_gb_s=LOOPBACK_GB_S)
    guess = speed_of(now, chip)
    chip = Chip(guess.compute_s * alone / guess.pairs_per_step, 1.0, node_gb_s=LOOPBACK_GB_S)
    counts = [ranks for ranks in RANKS if ranks <= options.batch]
    return {
        ranks: speed_of(
            now.changed(ranks=ranks, per_device_train_batch_size=options.batch // ranks), chip
        ).pairs_per_s
        for ranks in counts
    }


def llama_on_gpus() -> dict[int, float]:
    """What `plan` says of LMPO's published run of Llama-3-8B, on more and more GPUs."""

    settings: Any = read_settings(str(LLAMA))
    config, _ = find_config(settings, None)
    lengths = Lengths(assumed(settings, LLAMA_LENGTHS, LLAMA_PAIRS), "assumed")
    engine = shipped_engine("zero3", config.hidden_size)
    now = Scenario(settings, config, settings.build_objective(), engine, 1, lengths)
    return {ranks: speed_of(now.changed(ranks=ranks), Chip()).pairs_per_s for ranks in LLAMA_RANKS}
