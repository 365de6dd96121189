"""Settings that transformers refuses only when training starts, or that would do nothing here."""

from __future__ import annotations

import inspect
import os
import reprlib
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainingArguments

from ..errors import UserError, expect, expect_bool, expect_number, expect_whole, is_whole
from ..text import printable
from .launch import check_left_over
from .model import ModelSettings
from .names import METRICS

WHOLE_NUMBERS = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "sequence_parallel_size": 1,
    "per_device_eval_batch_size": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "max_nonfinite_steps": 0,
    "ddp_timeout": 1,
}
"""Whole numbers and the least each can be."""

LARGEST = 2**31 - 1
"""Of any setting: two of them multiplied are still a number of 64 bits."""

NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon")
BELOW_ONE = ("adam_beta1", "adam_beta2")

WITHOUT_EFFECT = {
    "auto_find_batch_size": "choose per_device_train_batch_size and gradient_accumulation_steps",
    "label_smoothing_factor": "use label_smoothing, a hyperparameter of simpo, dpo and others",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint at the end of the step without it",
    "train_sampling_strategy": "pairs are always drawn in random order",
}
"""transformers' settings that this trainer has no use for, and what to do instead."""


def check_training(args: TrainingArguments) -> None:
    """Raise ``UserError`` for the first of transformers' settings that cannot work here."""
    defaults = type(args).__dataclass_fields__
    for name, each in defaults.items():
        value = getattr(args, name, None)
        if type(each.default) in (int, float) and isinstance(value, str):
            raise UserError(f"{name}: expected a number, got {value!r}")
    for name, least in WHOLE_NUMBERS.items():
        expect_whole(name, getattr(args, name), least)
    for name in NOT_NEGATIVE:
        expect_number(name, getattr(args, name), "a number from 0 on", least=0)
    for name in BELOW_ONE:
        expect_number(name, getattr(args, name), "a number from 0 on, below 1", least=0, below=1)
    if args.max_steps == -1:
        expect_number("num_train_epochs", args.num_train_epochs, "a number above 0", above=0)
    else:
        expected = "a whole number of steps from 1 on, or -1 for num_train_epochs instead"
        expect("max_steps", args.max_steps, is_whole(args.max_steps, 1), expected)
    for name, advice in WITHOUT_EFFECT.items():
        if name in defaults and getattr(args, name) != defaults[name].default:
            raise UserError(f"{name}: does nothing in preference training; {advice}")
    for name in defaults:
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:
            raise UserError(
                f"{name}: expected a number up to {LARGEST:,}, got {reprlib.repr(value)}"
            )
    best = args.metric_for_best_model
    if best is None and str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
        raise UserError("metric_for_best_model: save_strategy: best needs one, such as loss")


def checkpointing_options() -> list[str]:
    """Keys that the installed transformers takes itself, from 5.20 on, and torch does not see."""
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
    own = () if enable is None else inspect.signature(enable).parameters
    return [name for name in ("every_n_layers", "offload") if name in own]


def check_checkpointing(kwargs: object, name: str = "gradient_checkpointing_kwargs") -> None:
    """Raise ``UserError`` for what torch's checkpoint() would hand on to the layers, unread.

    Args:
        name: of the setting; new releases of transformers know it by two.
    """
    parameters = inspect.signature(checkpoint).parameters.values()
    known = ["preserve_rng_state", *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
    known += checkpointing_options()
    given = kwargs if isinstance(kwargs, dict) else {}
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UserError(f"{name}: {unknown[0]!r} is not known; expected some of {', '.join(known)}")
    expect_whole(f"{name}: every_n_layers", given.get("every_n_layers", 1), 1)
    expect_bool(f"{name}: offload", given.get("offload", False))
    if given.get("offload") and not torch.accelerator.is_available():
        raise UserError(
            f"{name}: leave offload out here; it holds a GPU's activations in the host's memory, "
            "and there is no GPU"
        )


def check_machine(args: TrainingArguments) -> None:
    """Raise ``UserError`` for what transformers refuses without the setting's name and a remedy."""
    from transformers.utils import import_utils

    check_left_over()
    bfloat16 = import_utils.is_torch_bf16_gpu_available() or import_utils.is_torch_xla_available()
    for name in ("bf16", "bf16_full_eval"):
        if getattr(args, name) and not (bfloat16 or args.use_cpu):
            raise UserError(
                f"{name}: there is no GPU here that computes in bfloat16; set use_cpu: true to do "
                f"so on the CPU, or {name}: false"
            )
    if args.deepspeed and find_spec("deepspeed") is None:
        raise UserError("deepspeed: it is not installed; pip install 'widemargin[deepspeed]'")


def with_setting(message: str, args: TrainingArguments) -> str:
    """transformers' message about a choice that it does not know, after the setting's name."""
    value, refused, _ = message.partition(" is not a valid ")
    names = [name for name, given in vars(args).items() if refused and given == value]
    return f"{', '.join(names)}: {message}" if names else message


def unread_file(error: OSError, args: TrainingArguments) -> str:
    """The message about a file of settings that cannot be read, after the settings' names."""
    names = ("accelerator_config", "fsdp_config", "deepspeed")
    paths = {n: v for n in names if isinstance(v := getattr(args, n, None), str)}
    named = ", ".join(f"{name}: {value!r}" for name, value in paths.items())
    reason = error.strerror or type(error).__name__
    return f"{named or 'settings'}: the file cannot be read: {reason}"


def check_environment(args: TrainingArguments) -> None:
    """Raise ``UserError`` for what a setting needs and this machine or launch lacks."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )
    from transformers.utils.import_utils import is_liger_kernel_available

    launched = _launched_with("ACCELERATE_USE_PARALLELISM_CONFIG")
    if launched or getattr(args, "parallelism_config", None) is not None:
        raise UserError(
            "parallelism_config: leave it out, here and in accelerate's configuration; for long "
            "pairs set sequence_parallel_size, which knows packed rows"
        )
    available = get_available_reporting_integrations()
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise UserError(f"report_to: {name!r} is not known; expected none or some of {known}")
        if name not in available and name != "flyte":  # which that list leaves out
            raise UserError(
                f"report_to: {name} is not installed; install it or set report_to: none"
            )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("use_liger_kernel: it is not installed; pip install 'widemargin[liger]'")
    accelerator = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator, name, None):
            raise UserError(
                f"accelerator_config: {name} would deal pairs over the ranks a second time; "
                "leave it out"
            )


def check_attention(model: ModelSettings, mixed_precision: str) -> None:
    """Raise ``UserError`` for an attention that cannot compute here, or not in this precision."""
    name = model.attn_implementation or ""
    if name == "flash_attention_2":
        _check_flash_attention()
    elif "flash" in name and not torch.accelerator.is_available():
        raise UserError(f"attn_implementation: {name} needs a GPU; set attn_implementation: sdpa")
    full = model.dtype == "float32" and mixed_precision == "no"
    if full and "flash_attention" in name:
        raise UserError(
            f"attn_implementation: {name} computes in half precision only; set bf16: true"
        )


def _check_flash_attention() -> None:
    """flash-attn must be there; without it transformers would fetch other code from the hub."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    if find_spec("flash_attn") is None:
        raise UserError(
            "attn_implementation: flash_attention_2 needs flash-attn, which is not installed; "
            "pip install 'widemargin[flash-attn]', or set attn_implementation: sdpa"
        )
    if not is_flash_attn_2_available():
        raise UserError(
            "attn_implementation: flash_attention_2 needs a GPU and flash-attn 2.3.3 or newer; "
            "set attn_implementation: sdpa"
        )


def check_output(args: TrainingArguments) -> None:
    """Raise ``UserError`` where ``output_dir`` is not a folder that can be made and written."""
    if not str(args.output_dir).strip():
        raise UserError("output_dir: it is empty; name a folder")
    name = str(args.output_dir)
    try:
        name.encode()  # not for bytes of another encoding
        os.fsencode(name)  # nor in a process of another
    except UnicodeEncodeError:
        raise UserError(
            f"output_dir: {printable(name)}: name a folder in UTF-8, and set PYTHONUTF8=1 where "
            "the locale is another one"
        ) from None
    folder = os.path.abspath(name)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        problem = "cannot be written" if os.path.isdir(folder) else "is not a folder"
        raise UserError(f"output_dir: {args.output_dir}: {folder} {problem}; name another")


def check_metric(name: str | None, known: Sequence[str] = METRICS) -> None:
    """Raise ``UserError`` for a metric that is not measured, by which no model can be the best."""
    if name is not None and name.removeprefix("eval_") not in known:
        raise UserError(
            f"metric_for_best_model: {name!r} is not known; expected one of {', '.join(known)}"
        )


def check_evaluation(
    config: TrainingArguments, evaluation: object, *, measures_more: bool = False
) -> None:
    """Raise ``UserError`` where the settings ask for evaluations that the data do not allow.

    Args:
        evaluation: the evaluation data set, several by name, or None.
        measures_more: whether there are metrics besides `METRICS`, of names that nobody knows yet.
    """
    several = isinstance(evaluation, dict)
    missing = evaluation is None or (several and not evaluation)
    for name in ("eval_strategy", "eval_on_start"):
        if missing and getattr(config, name) not in ("no", False):
            raise UserError(
                f"{name}: there is no evaluation data; give some (a test split, eval_dataset) or "
                f"set {name}: {'no' if name == 'eval_strategy' else 'false'}"
            )
    if several and getattr(config, "eval_samples", 0):
        raise UserError(
            "eval_samples: answers are to the prompts of one evaluation set, and eval_dataset has "
            "several; give one, or set eval_samples: 0"
        )
    if not measures_more:
        sets = [f"{name}_" for name in evaluation] if several else [""]
        known = [f"{prefix}{metric}" for prefix in sets for metric in METRICS]
        check_metric(config.metric_for_best_model, known)


def is_split(args: TrainingArguments) -> bool:
    """Whether DeepSpeed or FSDP takes the model in hand: weights, gradients, precision."""
    return uses_deepspeed(args) or bool(args.fsdp) or _launched_with("ACCELERATE_USE_FSDP")


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether DeepSpeed runs the training, by settings or launcher."""
    return bool(args.deepspeed) or _launched_with("ACCELERATE_USE_DEEPSPEED")


def _launched_with(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
