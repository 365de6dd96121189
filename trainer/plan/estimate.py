"""All that `widemargin plan` says of a run, in the order in which it is worked out."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, expect_bool, refusals
from ..settings.config import PreferenceConfig
from ..settings.files import build_config, parse_overrides, read_yaml
from ..settings.published.translation import merge, translate
from .advice import Step, advice
from .chips import Chip
from .engines import Engine, read_engine, shipped_engine
from .lengths import find_lengths
from .memory import GIB
from .scenario import Scenario
from .shapes import find_config
from .simulation import Held
from .speed import Scaled, Speed, measured, scaling, speed_of

ELSEWHERE = (
    *("attn_implementation", "head_backend", "use_liger_kernel", "report_to", "tf32"),
    *("load_in_4bit", "load_in_8bit", "use_cpu", "deepspeed", "fsdp", "fsdp_config"),
)
"""Settings that are checked against the machine they are read on; put back unchecked."""
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
"""So is ``offload`` in either name's values."""


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run, and what to change where it does not fit.

    ``measured`` says who measured the speed; "" where nobody did.
    """

    path: str
    now: Scenario
    capacity: float
    model_source: str
    activations: dict[bool, Held]
    advice: list[Step]
    chip: Chip
    speed: Speed | None
    measured: str
    scaling: list[Scaled]

    @property
    def fits(self) -> bool:
        return self.now.memory.peak <= self.capacity


def estimate(options: argparse.Namespace, overrides: Sequence[str]) -> Estimate:
    """The estimate that the command line asks for.

    Raises:
        UserError: bad input.
    """
    if options.mfu > 1:
        raise UserError(f"--mfu: expected a share from 0 to 1, got {options.mfu:g}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    settings = read_settings(options.config, overrides)
    config, model_source = find_config(settings, options.model_config)
    now = Scenario(
        settings,
        config,
        settings.build_objective(),
        _engine(options, settings, config.hidden_size),
        options.gpus,
        find_lengths(settings, config.vocab_size, options.mean_lengths, options.pairs),
    )
    capacity = options.gpu_memory * GIB
    rate, rate_source = _rate(options, now)
    speed, chip = _speed(now, _chip(options), rate, timed=options.tflops is not None)
    return Estimate(
        path=options.config,
        now=now,
        capacity=capacity,
        model_source=model_source,
        activations={on: now.held(on) for on in (True, False)},
        advice=advice(now, capacity),
        chip=chip,
        speed=speed,
        measured=rate_source,
        scaling=[] if now.device == "cpu" else scaling(now, chip),
    )


def read_settings(path: str, overrides: Sequence[str] = ()) -> PreferenceConfig:
    """The settings of a run on another machine, whose GPUs and packages are not checked here.

    Raises:
        UserError: as `load_config`.
    """
    settings = translate(merge(read_yaml(Path(path)), parse_overrides(overrides)), [])
    elsewhere = {name: settings.pop(name) for name in ELSEWHERE if name in settings}
    for name in ("load_in_4bit", "load_in_8bit", "use_cpu"):
        if elsewhere.get(name) is not None:
            expect_bool(name, elsewhere[name])
    attention = elsewhere.get("attn_implementation")
    if not isinstance(attention, str | None):
        raise UserError(f"attn_implementation: expected a name, got {attention!r}")
    offload = False
    for name in CHECKPOINTING:
        if isinstance(settings.get(name), dict):
            offload = settings[name].pop("offload", offload)
            expect_bool(f"{name}: offload", offload)
    config: Any = build_config(settings | {"use_cpu": True, "report_to": "none"})
    config.use_cpu = False
    for name, value in elsewhere.items():
        setattr(config, name, value)
    for name in CHECKPOINTING:
        if offload and isinstance(getattr(config, name, None), dict):
            getattr(config, name)["offload"] = offload
    return config


def _engine(options: argparse.Namespace, settings: PreferenceConfig, hidden_size: int) -> Engine:
    if options.accelerate is not None:
        return read_engine(options.accelerate, hidden_size)
    if options.engine is not None:
        return shipped_engine(options.engine, hidden_size)
    return shipped_engine(
        "zero3" if options.gpus > 1 and not settings.use_cpu else "ddp", hidden_size
    )


def _chip(options: argparse.Namespace) -> Chip:
    return Chip(
        options.tflops or Chip.tflops,
        options.mfu,
        options.gpus_per_node,
        options.node_bandwidth,
        options.network_bandwidth,
    )


def _speed(
    now: Scenario, chip: Chip, rate: float | None, *, timed: bool
) -> tuple[Speed | None, Chip]:
    """The step's speed, and the chip as the measured ``rate``, if any, shows it to be.

    Args:
        timed: the chip's speed was given; without it, there is none for a CPU.
    """
    assumed = speed_of(now, chip)
    if rate is not None:
        speed = measured(assumed, rate)
        return speed, replace(chip, mfu=chip.mfu * assumed.compute_s / speed.compute_s)
    return (None if now.device == "cpu" and not timed else assumed), chip


def _rate(options: argparse.Namespace, now: Scenario) -> tuple[float | None, str]:
    """Pairs per second of all GPUs as somebody measured them, and the source."""
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
