"""Whether DeepSpeed or FSDP runs a training, by its settings."""

from __future__ import annotations

import os

from transformers import TrainingArguments


def is_split(args: TrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP takes the model in hand: weights, gradients, precision."""
    return uses_deepspeed(args) or bool(args.fsdp) or _launched_with("ACCELERATE_USE_FSDP")


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed runs the training, by settings or launcher."""
    return bool(args.deepspeed) or _launched_with("ACCELERATE_USE_DEEPSPEED")


def _launched_with(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
