"""Whether DeepSpeed or FSDP runs a training, by its settings."""

from __future__ import annotations

import os

from transformers import TrainingArguments

LAUNCHED_WITH = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")


def is_split(args: TrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP takes the model in hand: weights, gradients, precision."""
    by_launcher = any(os.environ.get(name, "false").lower() == "true" for name in LAUNCHED_WITH)
    return bool(args.deepspeed or args.fsdp) or by_launcher
