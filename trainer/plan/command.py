"""`widemargin plan`: the order in which things are found out."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError, refusals
from .advice import Step, advice
from .chips import Chip
from .engines import Engine, read_engine, shipped_engine
from .evaluation import Evaluation
from .lengths import find_lengths
from .memory import GIB
from .scaling import Scaled, scaling, speed_of
from .settings import read_settings
from .shapes import find_config
from .simulation import Held
from .speed import Speed, measured
from .text import as_dict, page


@dataclass(frozen=True)
class Findings:
    """All that a plan says."""

    path: str
    now: Evaluation
    capacity: float
    model_source: str
    activations: dict[bool, Held]
    advice: list[Step]
    chip: Chip
    speed: Speed | None
    measured: str
    scaling: list[Scaled]


def plan(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Print the plan; 0 if the run fits, 1 if it does not.

    Raises:
        UserError: bad input.
    """
    found = find(options, overrides)
    print("\n".join(page(found)))
    if options.json is not None:
        with refusals(f"--json {options.json}", OSError):
            options.json.write_text(json.dumps(as_dict(found), indent=2) + "\n", encoding="utf-8")
    return 0 if found.now.memory.peak <= found.capacity else 1


def find(options: argparse.Namespace, overrides: Sequence[str]) -> Findings:
    """Everything a plan says, worked out."""
    if options.mfu > 1:
        raise UserError(f"--mfu: expected a share from 0 to 1, got {options.mfu:g}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = read_settings(options.config, overrides)
    config, source = find_config(settings, options.model_config)
    engine = _engine(options, settings, config.hidden_size)
    now = Evaluation(
        settings,
        config,
        settings.build_objective(),
        engine,
        options.gpus,
        find_lengths(settings, config.vocab_size, options.mean_lengths, options.pairs),
    )
    chip = Chip(
        options.tflops or Chip.tflops,
        options.mfu,
        options.gpus_per_node,
        options.node_bandwidth,
        options.network_bandwidth,
    )
    capacity = options.gpu_memory * GIB
    speed = speed_of(now, chip)
    rate, rate_source = _rate(options, now)
    if rate is not None:
        assumed, speed = speed, measured(speed, rate)
        chip = replace(chip, mfu=chip.mfu * assumed.compute_s / speed.compute_s)
    elif now.device == "cpu" and options.tflops is None:
        speed = None
    return Findings(
        path=options.config,
        now=now,
        capacity=capacity,
        model_source=source,
        activations={on: now.held(on) for on in (True, False)},
        advice=advice(now, capacity),
        chip=chip,
        speed=speed,
        measured=rate_source,
        scaling=[] if now.device == "cpu" else scaling(now, chip),
    )


def _engine(options: argparse.Namespace, settings: Any, hidden_size: int) -> Engine:
    if options.accelerate is not None:
        return read_engine(options.accelerate, hidden_size)
    if options.engine is not None:
        return shipped_engine(options.engine, hidden_size)
    return shipped_engine(
        "zero3" if options.gpus > 1 and not settings.use_cpu else "ddp", hidden_size
    )


def _rate(options: argparse.Namespace, now: Evaluation) -> tuple[float | None, str]:
    """Pairs per second of all GPUs as somebody measured them, and who."""
    if options.pairs_per_s is not None and options.bench is not None:
        raise UserError("--pairs-per-s and --bench are both given; keep one")
    if options.pairs_per_s is not None:
        return options.pairs_per_s, f"--pairs-per-s {options.pairs_per_s:g}"
    if options.bench is None:
        return None, ""
    with refusals(
        f"--bench {options.bench}: no results of bench.training",
        OSError,
        ValueError,
        TypeError,
        KeyError,
    ):
        rows = json.loads(options.bench.read_text(encoding="utf-8"))["rows"]
        ours = [r for r in rows if r["provider"].startswith("widemargin") and "pairs_per_s" in r]
    if not ours:
        raise UserError(f"--bench {options.bench}: it has no run of this trainer")
    row = next((r for r in ours if now.packing.layout in r["provider"]), ours[0])
    where = f"{row['provider']}, {row['case']} on {row['device_name']}, one process"
    rate = row["pairs_per_s"] * now.ranks
    return rate, f"{options.bench}: {row['pairs_per_s']:g} pairs/s ({where}) times {now.ranks}"
