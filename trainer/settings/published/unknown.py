"""What to write instead of a setting that does not exist, in YAML and in Python."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

from ...errors import UserError
from ...objectives import ALIASES, OBJECTIVES, canonical_name, hyperparameters_of
from .keys import TABLE, Settings
from .loss_type import IN_DPO, MEANINGS, trl_mixture

Kind = TypeVar("Kind")


ELSEWHERE = {
    "base_model": "model_name_or_path",
    "pretrain": "model_name_or_path",
    "ref_pretrain": "ref_model_name_or_path",
    "tokenizer_name": "tokenizer_name_or_path",
    "stage": "objective",
    "rl": "objective",
    "pref_loss": "objective",
    "pref_ftx": "sft_weight",
    "nll_loss_coef": "sft_weight",
    "finetuning_type": "use_peft",
    "adapter": "use_peft",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "prompt_key": "columns",
    "chosen_key": "columns",
    "rejected_key": "columns",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_len": "max_length",
    "val_size": "eval_dataset",
    "val_set_size": "eval_dataset",
    "max_samples": "max_train_samples",
    "micro_batch_size": "per_device_train_batch_size",
    "micro_train_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "max_epochs": "num_train_epochs",
    "optimizer": "optim",
    "flash_attention": "attn_implementation",
    "flash_attn": "attn_implementation",
    "sample_packing": "packing",
    "packing_samples": "packing",
    "train_batch_size": "per_device_train_batch_size * gradient_accumulation_steps * GPUs",
    "save_path": "output_dir",
    "save_dir": "output_dir",
    "model": "model_name_or_path",
    "ref_model": "ref_model_name_or_path",
    "reference_model": "ref_model_name_or_path",
    "tokenizer": "tokenizer_name_or_path",
    "train_dataset": "dataset",
    "train_file": "dataset",
    "data_path": "dataset",
    "dataset_path": "dataset",
    "loss": "objective",
    "method": "objective",
    "lr": "learning_rate",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "use_lora": "use_peft",
    "qlora": "load_in_4bit",
    "mixed_precision": "bf16",
    "resume": "resume_from_checkpoint",
    "wandb": "report_to",
    "logger": "report_to",
}
"""Names in files of LLaMA-Factory, axolotl, OpenRLHF and open-instruct that resemble none here.

And first guesses, which a likeness of letters alone would answer with another setting.
"""


def unknown_key(key: str, objective: str, known: Iterable[str]) -> str:
    """The error's words on a key of a YAML file that neither a run nor its objective has."""
    owners = _owners(key)
    if owners:
        return f"{key}: {objective} has none; it belongs to {', '.join(owners)}"
    return _unknown(key, known)


def check_names(settings: Settings, known: Iterable[str]) -> None:
    """Raise ``UserError`` for the keys that neither a run nor any objective has."""
    known = {*known, *(name for each in OBJECTIVES for name in hyperparameters_of(each))}
    lines = [_unknown(key, known) for key in settings if key not in known]
    if lines:
        raise UserError("; ".join(lines))


def unknown_argument(key: str, given: Settings, known: Iterable[str]) -> str:
    """What to write instead of ``PreferenceConfig(key=...)``, ``given`` being all arguments."""
    value = given[key]
    if key == "loss_weights":
        return "loss_weights: give the weights to objective, as {'dpo': 0.8, 'sft': 1.0}"
    if key == "loss_type" and isinstance(value, list) and len(value) > 1:
        return _mixture_instead(value, given.get("loss_weights"))
    if key in ("loss_type", "trainer_type") and given.get("objective") is not None:
        return f"{key}: leave it out; objective={given['objective']!r} names the loss"
    if key in ("loss_type", "trainer_type"):
        return f"{key}: {_objective_instead(value)}"
    owners, objective = _owners(key), _named(given)
    if objective is not None and owners and key not in hyperparameters_of(objective):
        return f"{key}: leave it out; {objective} has none; it belongs to {', '.join(owners)}"
    if owners:
        return f"{key}: give it as objective_args={{{key!r}: {value!r}}}; it belongs to " + (
            ", ".join(owners)
        )
    if key == "cpo_alpha":
        return (
            "cpo_alpha: give it as objective_args={'alpha': ...} for cpo, {'sft_weight': ...} for "
            "simpo"
        )
    entry = TABLE.get(key)
    if entry is None or entry.translate is None:
        return _unknown(key, known)
    try:
        new = entry.translate(value, given)
    except UserError as error:
        return str(error)
    if not new:
        return f"{key}: leave it out ({entry.left_out or entry.meaning})"
    inside = {name: new.pop(name) for name in list(new) if name not in known}
    new |= {"objective_args": inside} if inside else {}
    return f"{key}: write {', '.join(f'{name}={meant!r}' for name, meant in new.items())} instead"


def _named(given: Settings) -> str | None:
    """The objective that arguments name, if it is a known one."""
    try:
        return canonical_name(given["objective"])
    except (KeyError, UserError):
        return None


def _mixture_instead(losses: list[Any], weights: Any) -> str:
    try:
        new = trl_mixture({"loss_type": losses, "loss_weights": weights}, [])
    except UserError as error:
        return str(error)
    nll = f", objective_args={{'nll': {new['nll']!r}}}" if "nll" in new else ""
    return f"loss_type: write objective={new['objective']!r}{nll} instead"


def _objective_instead(loss: Any) -> str:
    names = [IN_DPO.get(str(each), each) for each in loss] if isinstance(loss, list) else [loss]
    if len(names) == 1 and isinstance(loss, str) and loss in MEANINGS:
        return f"{loss!r} means another loss in each library; instead of it write {MEANINGS[loss]}"
    if len(names) == 1 and (names[0] in OBJECTIVES or names[0] in ALIASES):
        return f"write objective={ALIASES.get(names[0], names[0])!r} instead"
    return f"set objective to one of {', '.join(OBJECTIVES)} instead"


def _owners(key: str) -> list[str]:
    return [name for name in OBJECTIVES if key in hyperparameters_of(name)]


def _unknown(key: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(key, known := sorted(known), n=1, cutoff=0.7)
    nearest += [name for name in known if key.endswith(f"_{name}")]  # pref_beta, rl_beta
    meant = ELSEWHERE.get(key) or next(iter(nearest), None)
    advice = f"did you mean {meant!r}?" if meant else "leave it out (no setting has a similar name)"
    return f"unknown setting {key!r}; {advice}"


def explaining(kind: type[Kind]) -> type[Kind]:
    """The class with an ``__init__`` that says what to write instead of an unknown argument."""
    init = kind.__init__
    known = [each.name for each in fields(kind) if each.init]  # pyright: ignore[reportArgumentType]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        lines = [unknown_argument(name, given, known) for name in given if name not in known]
        if lines:
            raise UserError("; ".join(lines))
        init(self, *args, **given)

    kind.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
    return kind
