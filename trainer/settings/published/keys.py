"""Published setting names and what each becomes: one table, shown by docs/migration.md.

Sources: the YAML files of the SimPO, LMPO and gamma-PO repositories; the settings classes their
scripts read them with (the alignment handbook's, which they build on, and a ``SimPOConfig`` of
their own); transformers 4, whose names those files use; and TRL's DPO, CPO and KTO settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UserError, expect
from .model_arguments import model_arguments

Settings = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One published key.

    ``becomes`` names our setting, "" where none is left. ``translate(value, settings)`` gives our
    settings, ``settings`` being all that was given; None leaves the key as it is.
    """

    name: str
    becomes: str
    meaning: str
    translate: Callable[[Any, Settings], Settings] | None = None
    left_out: str = ""  # why nothing is left, for the note


def _same(name: str, meaning: str) -> Key:
    return Key(name, name, meaning)


def _renamed(name: str, becomes: str, meaning: str = "") -> Key:
    return Key(name, becomes, meaning, lambda value, _: {becomes: value})


def _dropped(name: str, meaning: str) -> Key:
    return Key(name, "", meaning, lambda *_: {}, meaning)


def _only(name: str, harmless: tuple[Any, ...], advice: str) -> Key:
    """A key of which only these values mean what is done here anyway."""

    def translate(value: Any, _: Settings) -> Settings:
        if value not in (None, *harmless):
            shown = "what it says" if isinstance(value, dict | list) else repr(value)
            raise UserError(f"{name}: {shown} cannot be done here; {advice}")
        return {}

    values = " or ".join(("null", *map(yaml_value, harmless)))
    return Key(name, "", f"only {values}; {advice}", translate, "so it is here anyway")


def number(name: str, value: Any) -> float | None:
    """``value`` as a finite number, text such as "1e-1" included; None stays None."""
    if value is None:
        return None
    try:  # numbers of numpy too
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    expect(name, value, math.isfinite(result), "a number")
    return result


def _dtype(value: Any, _: Settings) -> Settings:
    return {"dtype": "float32" if value is None else value}


def _flash_attention(value: Any, settings: Settings) -> Settings:
    other = settings.get("attn_implementation")
    if not value:
        return {}
    if other not in (None, "flash_attention_2"):
        raise UserError(
            f"use_flash_attention_2: given beside attn_implementation: {other}; keep one of them"
        )
    return {} if other else {"attn_implementation": "flash_attention_2"}


def _warmup(value: Any, settings: Settings) -> Settings:
    share = number("warmup_ratio", value)
    steps = settings.get("warmup_steps")
    if share is None or (steps is not None and number("warmup_steps", steps) != 0):
        return {}
    if not 0 <= share < 1:
        raise UserError(
            f"warmup_ratio: expected a share of all steps, from 0 to below 1, got {value!r}; for a "
            "number of steps set warmup_steps"
        )
    return {"warmup_steps": share}


def _gamma(name: str) -> Callable[[Any, Settings], Settings]:
    def translate(value: Any, settings: Settings) -> Settings:
        margin, beta = number(name, value), number("beta", settings.get("beta"))
        if margin is None:
            return {}
        if not beta:
            raise UserError(f"{name}: it is a multiple of beta here; give beta beside it")
        return {"gamma_beta_ratio": margin / beta}

    return translate


def _splits(value: Any, settings: Settings) -> Settings:
    names = (settings.get("dataset_train_split", "train"), settings.get("dataset_test_split"))
    return {"dataset_splits": [name for name in names if name]}


def _rpo(value: Any, settings: Settings) -> Settings:
    tokens = value and settings.get("nll") is None  # as TRL averages this likelihood
    return {"sft_weight": value} | ({"nll": "tokens"} if tokens else {})


def _packed(value: Any, settings: Settings) -> Settings:
    return {"packing": "packed"} if value and "packing" not in settings else {}


def yaml_value(value: Any) -> str:
    """``value`` as a YAML file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def note(name: str, value: Any, new: Settings, why: str = "") -> str:
    """The line that says what became of a key."""
    now = ", ".join(f"{n}: {yaml_value(v)}" for n, v in new.items()) or "nothing"
    return f"{name}: {yaml_value(value)} -> {now}" + (f" ({why})" if why else "")


_MODEL_ARGUMENTS = "give dtype, attn_implementation, model_revision, ... as settings of their own"
_ONE_GROUP = "pairs of one reference model and one loss are what this trainer knows"

HANDBOOK = (
    _same("model_name_or_path", "a folder or a hub name"),
    _only("base_model_revision", (), "model_revision says which revision to load"),
    _only("model_code_revision", (), "model_revision covers the model's code too"),
    Key(
        "torch_dtype",
        "dtype",
        "null is float32, which is what transformers 4 then loaded: fp32 weights, and computation "
        "in bfloat16 under bf16: true",
        _dtype,
    ),
    Key(
        "use_flash_attention_2",
        "attn_implementation",
        "true is flash_attention_2, false transformers' choice",
        _flash_attention,
    ),
    _same("attn_implementation", "flash_attention_2 needs flash-attn (extra flash-attn)"),
    _same("chat_template", "the template, a file's path, or the name of a shipped one"),
    _same("dataset_mixer", "name -> share of its training splits; evaluation splits stay whole"),
    _same("dataset_splits", "those with train in their names, or else the first, train"),
    _only("dataset_configs", (), "write it after the name: owner/data:configuration"),
    _same("preprocessing_num_workers", "processes that tokenize"),
    _same(
        "auto_insert_empty_system_msg",
        "true by default in the published scripts and their twins here, false otherwise",
    ),
    _dropped("truncation_side", "the published scripts set it to left; see truncation_mode"),
    _only("dataset_mixture", (), "write dataset_mixer (name: share) and dataset_splits instead"),
    _dropped("text_column", "for supervised fine-tuning on plain text"),
    _only("max_seq_length", (), "write max_length, or for an SFT file use TRL's SFTTrainer"),
)

SIMPO = (
    _same("beta", "scale of the rewards"),
    _same("gamma_beta_ratio", "margin / beta; for r-dpo, cpo and orpo it becomes alpha"),
    Key("gamma", "gamma_beta_ratio", "the margin itself, divided by beta", _gamma("gamma")),
    _same("label_smoothing", "where the objective has it; 0 is accepted everywhere"),
    _same("sft_weight", "averages over each chosen answer, then pairs; there: over all tokens"),
    Key(
        "loss_type",
        "objective",
        "sigmoid is the launched twin's objective, and dpo under trainer_type: dpo; alone it, "
        "hinge, ipo and kto mean another loss in each library, and are asked about",
    ),
    _same("disable_dropout", "attention's own dropout included"),
    _same("max_length", "null is no limit; in a twin 512, as in the published trainers"),
    _same("max_prompt_length", "null is no limit; in a twin 128, as in the published trainers"),
    _same(
        "max_completion_length",
        "a limit of its own; a twin ignores it, as the published trainers did",
    ),
    _dropped("max_target_length", "for encoder-decoder models only"),
    _same("truncation_mode", "which side of a long prompt stays"),
    _renamed("dataset_num_proc", "preprocessing_num_workers"),
    _dropped("padding_value", "padding is masked, whatever its value"),
    _dropped("label_pad_token_id", "there are no padded labels"),
    _only("generate_during_eval", (False,), "evaluation scores pairs and writes no text"),
    _only("is_encoder_decoder", (False,), "models are decoder-only"),
    Key("model_init_kwargs", "dtype", "and other settings by its keys", model_arguments),
)

GAMMA_PO = (
    Key("trainer_type", "objective", "simpo or dpo: which objectives loss_type may name"),
    _same("tau", "of gamma-simpo, gamma-dpo, beta-simpo and beta-dpo; elsewhere without effect"),
    _same(
        "length_norm",
        "objectives of the SimPO type always use means: true is accepted, false refused; cpo too "
        "uses means unless told otherwise; those of the DPO type use sums unless told otherwise "
        "(the repository's class says true for both, so write it)",
    ),
    _same("flip", "each training pair by a seeded draw; there: whole micro-batches, by chance"),
)

TRANSFORMERS = (
    _renamed("evaluation_strategy", "eval_strategy"),
    Key(
        "warmup_ratio",
        "warmup_steps",
        "a share of all steps, below 1; a warmup_steps above 0 beside it counts instead",
        _warmup,
    ),
    _same("gradient_checkpointing", "under the name the installed transformers has for it"),
    _same("gradient_checkpointing_kwargs", "use_reentrant: false where nothing is said"),
    _same("hub_model_id", "with push_to_hub"),
    _same(
        "save_steps",
        "the published 1000000 saves one checkpoint, after the last step; save_strategy: no saves "
        "none, and the trained model is saved anyway",
    ),
    _renamed("no_cuda", "use_cpu"),
    _only("save_safetensors", (True,), "weights are saved in no other format"),
    _only("group_by_length", (False,), "pairs are drawn at random, their tokens balanced anyway"),
    _only("half_precision_backend", ("auto",), "torch's own is the only one"),
    _dropped("fp16_opt_level", "for apex, which is not used"),
    _dropped("include_tokens_per_second", "the log has tokens_per_s anyway"),
    _dropped("logging_dir", "for tensorboard set TENSORBOARD_LOGGING_DIR in the environment"),
    _dropped("overwrite_output_dir", "transformers 5 has none: runs write into output_dir"),
)

TRL = (
    _renamed("dataset_name", "dataset"),
    Key("dataset_train_split", "dataset_splits", "alone: no evaluation", _splits),
    Key("dataset_test_split", "dataset_splits", "", _splits),
    _only("dataset_config", (), "write it after the name: owner/data:configuration"),
    _only("dataset_streaming", (False,), "data sets are read whole"),
    _only("datasets", (), "write dataset_mixer (name: share), dataset_splits and columns instead"),
    _only("streaming", (False,), "data sets are read whole"),
    _only("test_split_size", (), "give a data set to evaluate on as eval_dataset"),
    _only("env", (), "set these variables in the shell that starts the run"),
    _only("ignore_bias_buffers", (False,), "set ddp_broadcast_buffers: false instead"),
    Key("simpo_gamma", "gamma_beta_ratio", "divided by beta", _gamma("simpo_gamma")),
    Key(
        "cpo_alpha",
        "alpha",
        "for cpo, cpo-hinge and cpo-ipo; elsewhere sft_weight; 1.0 by default in TRL; with "
        "nll: tokens",
    ),
    Key("rpo_alpha", "sft_weight", "with nll: tokens", _rpo),
    _same("precompute_ref_log_probs", "computed once and kept on disk for later runs"),
    _dropped("precompute_ref_batch_size", "per_device_eval_batch_size is used"),
    Key("padding_free", "packing", "true is packed; prefix_shared computes less still", _packed),
    _dropped("use_liger_loss", "no objective here builds logits"),
    _dropped("use_logits_to_keep", "only positions that predict an answer reach the head"),
    _dropped("pad_to_multiple_of", "packing leaves nothing to pad"),
    _only("reference_free", (False,), "use simpo, cpo or another objective without a reference"),
    _same("sync_ref_model", "without adapter, ZeRO-3 and FSDP"),
    _same("f_divergence_type", "of objectives that know a pair by its gap alone"),
    _same("f_alpha_divergence_coef", "only beside f_divergence_type: alpha_divergence"),
    _same("ref_model_mixup_alpha", "for sync_ref_model"),
    _same("ref_model_sync_steps", "for sync_ref_model"),
    _same("discopop_tau", "of discopop"),
    _dropped("force_use_ref_model", "ref_model_name_or_path, where given, is the reference"),
    _only("ref_model_init_kwargs", (), _MODEL_ARGUMENTS),
    Key("loss_weights", "objective", "with a list of loss_type: a mixture of objectives"),
    _same("ld_alpha", "of objectives of pairs with a reference; null is 1"),
    _same("use_weighting", "of objectives whose loss is one pair's (not aot, lists, labels)"),
    _only("model_adapter_name", (), _ONE_GROUP),
    _only("ref_adapter_name", (), _ONE_GROUP),
    _same("router_aux_loss_coef", "by default the model's own, as TRL has it; 0 leaves it out"),
    _only("activation_offloading", (False,), "use gradient_checkpointing"),
    _dropped("pad_token", "padding is masked, whichever token it is"),
    _only("lora_task_type", ("CAUSAL_LM",), "leave it out"),
    _only("bnb_4bit_quant_storage", ("uint8",), "leave it out"),
)

SOURCES = {
    "The alignment handbook, which the published scripts build on": HANDBOOK,
    "SimPO, and LMPO, which shares its settings": SIMPO,
    "gamma-PO adds": GAMMA_PO,
    "transformers 4": TRANSFORMERS,
    "TRL's DPOConfig, CPOConfig, KTOConfig and ScriptArguments": TRL,
}

TABLE = {key.name: key for keys in SOURCES.values() for key in keys}
