"""Who holds what, and in which dtype: ZeRO, FSDP2 or DDP, as an accelerate config sets them up."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, refusals
from ..files import read_json
from ..settings.config import PreferenceConfig
from ..settings.files import read_yaml

SHIPPED = {
    "zero3": "deepspeed_zero3.yaml",
    "zero2": "deepspeed_zero2.yaml",
    "fsdp2": "fsdp2.yaml",
    "ddp": "multi_gpu.yaml",
}
"""The accelerate config shipped for each engine."""


@dataclass(frozen=True)
class Engine:
    """How weights, gradients and optimizer states are spread; sizes of buffers in elements.

    Defaults of the buffers are DeepSpeed's.
    """

    name: str  # "zero3", "zero2", "fsdp2" or "ddp"
    source: str = ""
    processes: int | None = None
    optimizer_on_cpu: bool = False
    parameters_on_cpu: bool = False
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    gradients_fp32: bool = False
    overlap: bool = True

    @property
    def splits_weights(self) -> bool:
        return self.name in ("zero3", "fsdp2")

    @property
    def is_deepspeed(self) -> bool:
        return self.name in ("zero2", "zero3")


@dataclass(frozen=True)
class Precision:
    """Dtypes as the engine arranges them."""

    stored: torch.dtype  # of the weights that stay on the rank
    simulated: torch.dtype  # of the weights that a layer computes with
    autocast: torch.dtype | None

    @property
    def compute_bytes(self) -> int:
        return (self.autocast or self.simulated).itemsize

    @property
    def copies_weights(self) -> bool:
        """Whether autocast rounds weights that are wider."""
        return self.autocast not in (None, self.simulated)


def precision(settings: PreferenceConfig, config: Any, engine: Engine) -> Precision:
    """How a run computes on ``engine``; ``config`` is the model's."""
    half = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None
    name = settings.dtype
    saved = getattr(config, "dtype", None) or torch.float32
    loaded = saved if name == "auto" else getattr(torch, name)
    if engine.is_deepspeed:
        return Precision(half or torch.float32, half or torch.float32, None)
    if engine.name == "fsdp2":
        stored = torch.float32 if half else loaded
        return Precision(stored, half or loaded, half)
    if settings.load_in_4bit or settings.load_in_8bit:
        return Precision(half or loaded, half or loaded, half)
    return Precision(loaded, loaded, half)


def shipped_engine(name: str, hidden_size: int) -> Engine:
    """The engine as the accelerate config shipped here sets it up."""
    return read_engine(
        Path(str(files("widemargin.configs"))) / "accelerate" / SHIPPED[name], hidden_size
    )


def read_engine(path: Path, hidden_size: int) -> Engine:
    """The engine that an accelerate config describes.

    Raises:
        UserError: no such file, or an engine that this trainer is not made for.
    """
    settings = read_yaml(path)
    kind = str(settings.get("distributed_type", "NO")).upper()
    processes = settings.get("num_processes")
    common: dict[str, Any] = {
        "source": path.name,
        "processes": processes if isinstance(processes, int) else None,
    }
    if kind == "DEEPSPEED":
        return _deepspeed(path, settings.get("deepspeed_config") or {}, hidden_size, common)
    if kind == "FSDP":
        fsdp = settings.get("fsdp_config") or {}
        if fsdp.get("fsdp_version") != 2:
            raise UserError(f"accelerate config {path}: only version 2 of FSDP is known here")
        offload = bool(fsdp.get("fsdp_offload_params"))
        return Engine("fsdp2", optimizer_on_cpu=offload, parameters_on_cpu=offload, **common)
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return Engine("ddp", **common)
    raise UserError(
        f"accelerate config {path}: distributed_type {kind} is not known; expected DEEPSPEED, "
        "FSDP, MULTI_GPU or NO"
    )


def _deepspeed(path: Path, plugin: dict, hidden_size: int, common: dict[str, Any]) -> Engine:
    named = plugin.get("deepspeed_config_file")
    config: dict[str, Any] = {}
    if named:
        sibling = path.parent / Path(named).name
        file = Path(named) if Path(named).is_file() else sibling
        with refusals(f"DeepSpeed's config {named}: cannot be read", OSError, ValueError):
            config = read_json(file)
    zero = config.get("zero_optimization") or {
        "stage": plugin.get("zero_stage", 2),
        "offload_optimizer": {"device": plugin.get("offload_optimizer_device", "none")},
        "offload_param": {"device": plugin.get("offload_param_device", "none")},
    }
    if zero.get("stage") not in (2, 3):
        raise UserError(
            f"accelerate config {path}: expected ZeRO stage 2 or 3, got {zero.get('stage')}"
        )
    # What transformers puts in the place of "auto".
    square = hidden_size * hidden_size
    sizes = {
        "reduce_bucket": ("reduce_bucket_size", square),
        "prefetch_bucket": ("stage3_prefetch_bucket_size", int(0.9 * square)),
        "max_live": ("stage3_max_live_parameters", Engine.max_live),
        "sub_group": ("sub_group_size", Engine.sub_group),
    }
    given = {
        ours: auto if zero[theirs] == "auto" else int(float(zero[theirs]))
        for ours, (theirs, auto) in sizes.items()
        if theirs in zero
    }
    return Engine(
        f"zero{zero['stage']}",
        optimizer_on_cpu=_offloads(zero.get("offload_optimizer")),
        parameters_on_cpu=_offloads(zero.get("offload_param")),
        gradients_fp32=(config.get("data_types") or {}).get("grad_accum_dtype") == "fp32",
        overlap=bool(zero.get("overlap_comm", zero["stage"] == 3)),
        **given,
        **common,
    )


def _offloads(settings: Any) -> bool:
    return isinstance(settings, dict) and settings.get("device") in ("cpu", "nvme")
