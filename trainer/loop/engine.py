"""What DeepSpeed's own file says beside the settings of the run."""

from __future__ import annotations

import re
from typing import Any

from ..errors import UserError

TRAINS_OTHERWISE = (
    "scheduler", "curriculum_learning", "data_efficiency", "progressive_layer_drop",
    "compression_training", "quantize_training", "tensor_parallel", "hybrid_engine", "amp",
)  # fmt: skip
"""Parts of the file that change what is learnt, past the settings and their record."""

NEEDED = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_clipping": "max_grad_norm",
}
"""Keys of the file, and the settings that an absent key would leave without effect."""

ADAM = ("lr", "betas", "eps", "weight_decay")
_MISMATCH = re.compile(r"- ds (\S+)=(.*) vs hf (.*)=(.*)")


def check_deepspeed(state: Any, args: Any) -> list[str]:
    """Raise ``UserError`` where DeepSpeed's file and the settings contradict each other.

    Args:
        state: accelerate's, after transformers has put settings in place of "auto".
        args: the settings.

    Returns:
        What is worth saying.
    """
    plugin = getattr(state, "deepspeed_plugin", None)
    if plugin is None:
        return []
    config: dict[str, Any] = plugin.hf_ds_config.config
    problems = [
        f'{match[1]}: "auto", where it says {match[2]} and {match[3]} is {match[4]}'
        for match in map(_MISMATCH.fullmatch, getattr(plugin.hf_ds_config, "mismatches", []))
        if match
    ]
    problems += [
        f'{key}: "auto", without which {name} has no effect'
        for key, name in NEEDED.items()
        if not config.get(key) and getattr(args, name)
    ]
    optimizer = config.get("optimizer") or {}
    problems += _optimizer_problems(optimizer, args)
    problems += [f"no {name}" for name in TRAINS_OTHERWISE if _is_on(config.get(name))]
    if problems:
        raise UserError(
            f"deepspeed: the settings of the run decide; write in its file {'; '.join(problems)}"
        )
    return [f"DeepSpeed's own {optimizer['type']} trains, as its file says"] if optimizer else []


def _optimizer_problems(optimizer: dict[str, Any], args: Any) -> list[str]:
    """The file's optimizer may compute the settings' AdamW in its own way, and nothing else."""
    if not optimizer:
        return []
    kind, optim = optimizer.get("type"), str(getattr(args.optim, "value", args.optim))
    if kind != "AdamW" or optim not in ("adamw_torch", "adamw_torch_fused"):
        return [f"no optimizer, since it has {kind} and optim is {optim}"]
    if args.weight_decay:  # transformers spares norms and biases
        return ["no optimizer, since its own also decays norms and biases (weight_decay)"]
    params = optimizer.get("params") or {}
    return [f'optimizer.params.{name}: "auto"' for name in ADAM if name not in params]


def _is_on(part: Any) -> bool:
    return part.get("enabled", True) if isinstance(part, dict) else bool(part)
