"""Settings that a run has no use for as it is otherwise set: each is said, or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from ..errors import UserError
from .config import PreferenceConfig, defaults_of
from .model import AdapterSettings

if TYPE_CHECKING:
    from ..objectives import Objective

logger = logging.getLogger(__name__)

_LORA = tuple(
    each.name
    for each in fields(AdapterSettings)
    if each.name.startswith(("lora_", "use_rs", "use_d"))
)

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_WITHOUT_KWARGS = ("constant", "constant_with_warmup")
_WITHOUT_ARGS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
    "lomo", "adalomo",
)  # fmt: skip
"""What transformers makes without a look at the setting."""

USES: tuple[tuple[tuple[str, ...], Callable[[PreferenceConfig, Objective], object], str], ...] = (
    (
        _LORA,
        lambda config, _: config.use_peft,
        "set use_peft: true for a new adapter; one that goes on keeps its own",
    ),
    (
        ("bnb_4bit_quant_type", "use_bnb_nested_quant"),
        lambda config, _: config.load_in_4bit,
        "set load_in_4bit: true",
    ),
    (
        ("fp16",),
        lambda config, _: config.mixed_precision == "fp16",
        "train on a GPU; a CPU computes in float32, or in bfloat16 by bf16: true",
    ),
    (
        ("ref_model_sync_steps", "ref_model_mixup_alpha"),
        lambda config, _: config.sync_ref_model,
        "set sync_ref_model: true",
    ),
    (
        ("precompute_ref_log_probs",),
        lambda _, objective: objective.needs_reference,
        "take an objective with a reference",
    ),
    (
        ("eval_samples_max_new_tokens", "eval_samples_temperature"),
        lambda config, _: config.eval_samples,
        "set eval_samples above 0",
    ),
    (
        ("head_tail_eps",),
        lambda config, _: config.head_tail != "exact",
        "set head_tail: mean or drop",
    ),
    (
        ("warmup_steps",),
        lambda config, _: config.lr_scheduler_type not in _WITHOUT_WARMUP,
        "set lr_scheduler_type: constant_with_warmup, or another that warms up",
    ),
    (
        ("lr_scheduler_kwargs",),
        lambda config, _: config.lr_scheduler_type not in _WITHOUT_KWARGS,
        "set an lr_scheduler_type that takes some",
    ),
    (
        ("optim_args",),
        lambda config, _: config.optim not in _WITHOUT_ARGS,
        "set another optim; adam_beta1, adam_beta2 and adam_epsilon are settings of their own",
    ),
)
"""Settings, whether a run uses them, and what would make it do so."""


def unused_notes(config: PreferenceConfig, objective: Objective) -> list[str]:
    """A line for each group of settings that were given another value than their default in vain.

    Raises:
        UserError: one that asks for another run than this one would be.
    """
    if not objective.needs_reference:
        if config.ref_model_name_or_path is not None:
            raise UserError(f"ref_model_name_or_path: {objective.name} uses none; leave it out")
        if config.sync_ref_model:
            raise UserError(f"sync_ref_model: {objective.name} has no reference; leave it out")
    defaults = defaults_of(type(config))
    lines = []
    for names, used, remedy in USES:
        given = [name for name in names if getattr(config, name) != defaults[name]]
        if given and not used(config, objective):
            verb = "does" if len(given) == 1 else "do"
            lines.append(f"{', '.join(given)}: {verb} nothing here; to use: {remedy}")
    return lines


def say_unused(config: PreferenceConfig, objective: Objective) -> None:
    """Warn of them, on the first rank; raises as `unused_notes` does."""
    for line in unused_notes(config, objective):
        if config.process_index == 0:
            logger.warning(line)
