"""What `PreferenceTrainer` is given: checked, with a word on TRL's habits, and completed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from ..errors import UserError
from ..settings.config import PreferenceConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ORDER = (
    "here the order is model, args, train_dataset, eval_dataset, processing_class, ref_model, "
    "peft_config, data_collator, callbacks, optimizers; give them by name"
)
_LOGITS = "evaluation makes no logits; compute_metrics gets the rewards of chosen and rejected"


def settled_arguments(
    model: Any,
    args: Any,
    train_dataset: Any,
    processing_class: Any,
    ref_model: Any,
    has_objective: bool,
    model_init: Any,
    quantization_config: Any,
    preprocess_logits: Any,
) -> tuple[Any, PreferenceConfig]:
    """Model and settings, made where TRL would make them.

    Raises:
        UserError: an argument of another kind, or in TRL's order.
    """
    if isinstance(train_dataset, TrainingArguments):
        raise UserError(f"args: TRL's DPOTrainer has them third, after ref_model; {_ORDER}")
    if hasattr(processing_class, "column_names") or hasattr(ref_model, "pad_token_id"):
        raise UserError(
            f"train_dataset: TRL's CPOTrainer has data_collator before it, third; {_ORDER}"
        )
    if preprocess_logits is not None:
        raise UserError(f"preprocess_logits_for_metrics: leave it out; {_LOGITS}")
    if args is None and has_objective:
        args = PreferenceConfig()
    if not isinstance(args, PreferenceConfig):
        given = "none" if args is None else type(args).__name__
        raise UserError(
            f"args: expected a PreferenceConfig, got {given}; PreferenceConfig(objective='dpo') is "
            "TRL's default, and for other libraries' settings see docs/migration.md"
        )
    if model_init is not None:
        if model is not None:
            raise UserError("model_init: given beside model; keep one")
        model = model_init()
    if not isinstance(model, str | torch.nn.Module):
        raise UserError(
            f"model: expected a causal language model or its name, got {type(model).__name__}"
        )
    if isinstance(processing_class, str):
        raise UserError(
            "processing_class: expected a tokenizer, got its name; leave it out and set "
            f"PreferenceConfig(tokenizer_name_or_path={processing_class!r})"
        )
    _check_quantization(model, args, quantization_config)
    return model, args


def _check_quantization(model: Any, args: PreferenceConfig, quantization_config: Any) -> None:
    if quantization_config is None:
        return
    if not isinstance(model, str):
        raise UserError(
            "quantization_config: the model is loaded already; give it to from_pretrained, or give "
            "the model by its name"
        )
    if args.load_in_4bit or args.load_in_8bit:
        raise UserError("quantization_config: given beside load_in_4bit or load_in_8bit; keep one")


def reference_source(
    model: Any, args: PreferenceConfig, ref_model: Any
) -> tuple[PreTrainedModel | None, bool]:
    """A reference that is a model and not a name, and whether it is the model as it is now."""
    if isinstance(ref_model, str):
        args.ref_model_name_or_path, ref_model = ref_model, None
    # An object may have other weights by now than what its name stands for.
    of_policy = (None, model) if isinstance(model, str) else (None,)
    return ref_model, ref_model is None and args.ref_model_name_or_path in of_policy
