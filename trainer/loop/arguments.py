"""What a trainer is given, checked: its arguments, with a word on TRL's habits, and its engine."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from ..errors import UserError
from ..settings.config import PreferenceConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..objectives import Objective

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
    if args.use_liger_kernel and args.device.type == "cpu":
        raise UserError("use_liger_kernel: leave it out here; its kernels need a GPU")
    if model_init is not None:
        if model is not None:
            raise UserError("model_init: given beside model; keep one")
        model = _made_by(model_init)
    if not isinstance(model, str | torch.nn.Module):
        raise UserError(
            f"model: expected a causal language model or its name, got {type(model).__name__}"
        )
    if hasattr(model, "_orig_mod"):
        raise UserError("model: give it as it was before torch.compile; set torch_compile: true")
    if not isinstance(model, str) and not hasattr(model, "config"):
        raise UserError(
            f"model: give it without the {type(model).__name__} around it; a model of transformers "
            "or peft is expected"
        )
    if isinstance(processing_class, str):
        raise UserError(
            "processing_class: expected a tokenizer, got its name; leave it out and set "
            f"PreferenceConfig(tokenizer_name_or_path={processing_class!r})"
        )
    _check_quantization(model, args, quantization_config)
    return model, args


def _made_by(model_init: Any) -> Any:
    """A function for transformers' search takes a trial, which is None outside of one."""
    parameters = inspect.signature(model_init).parameters.values()
    takes_trial = any(
        p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters
    )
    return model_init(None) if takes_trial else model_init()


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
    model: Any, args: PreferenceConfig, ref_model: Any, objective: Objective
) -> tuple[PreTrainedModel | None, bool]:
    """A reference that is a model and not a name, and whether it is the model as it is now."""
    if isinstance(ref_model, str):
        args.ref_model_name_or_path, ref_model = ref_model, None
    if ref_model is not None and not objective.needs_reference:
        raise UserError(f"ref_model: {objective.name} uses none; leave it out")
    # An object may have other weights by now than what its name stands for.
    of_policy = (None, model) if isinstance(model, str) else (None,)
    return ref_model, ref_model is None and args.ref_model_name_or_path in of_policy


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


def check_saves_whole(state: Any) -> None:
    """Raise ``UserError`` if the engine of accelerate's ``state`` would save only a part."""
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
        raise UserError(
            "fsdp_state_dict_type: set FULL_STATE_DICT in the launcher's file; with "
            f"{fsdp.state_dict_type} no trained model would be written"
        )
    deepspeed = getattr(state, "deepspeed_plugin", None)
    config = {} if deepspeed is None else deepspeed.deepspeed_config
    zero = config.get("zero_optimization", {})
    gathers = "stage3_gather_16bit_weights_on_model_save"
    if zero.get("stage") == 3 and not zero.get(gathers):
        raise UserError(
            f"{gathers}: set it to true under zero_optimization in the DeepSpeed file; without it "
            "no trained model would be written"
        )
