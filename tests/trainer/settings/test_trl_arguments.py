"""Every argument of TRL's settings, in a file and in Python: its effect, or a line with a remedy.

The rows say what a file's key becomes ({} where nothing is left of it, which a note says), or the
error; and what Python says of the same argument, where it does not do the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings.config import PreferenceConfig
from widemargin.trainer.settings.files import build_config

from docs import trl_defaults

HERE = {"use_cpu": True, "report_to": "none"}
OWN = "give it as objective_args={"
OUT = "leave it out"

Row = tuple[str, Any, Any, str | None]

#: For objective: dpo.
DPO: list[Row] = [
    ("learning_rate", 3e-6, {"learning_rate": 3e-6}, None),
    ("bf16", True, {"bf16": True}, None),
    ("gradient_checkpointing", True, {"gradient_checkpointing": True}, None),
    ("logging_steps", 3, {"logging_steps": 3}, None),
    ("model_init_kwargs", {"dtype": "float16"}, {"dtype": "float16"}, "write dtype='float16'"),
    (
        *("model_init_kwargs", {"dtype": torch.bfloat16, "revision": "v2", "use_cache": False}),
        {"dtype": "bfloat16", "model_revision": "v2"},
        "write dtype='bfloat16', model_revision='v2' instead",
    ),
    ("model_init_kwargs", {"device_map": "auto"}, "leave device_map out", "leave device_map out"),
    ("model_init_kwargs", "auto", "expected a mapping", "expected a mapping"),
    ("trust_remote_code", True, {"trust_remote_code": True}, None),
    ("router_aux_loss_coef", 0.01, {"router_aux_loss_coef": 0.01}, None),
    ("disable_dropout", False, {"disable_dropout": False}, None),
    (
        *("dataset_num_proc", 2, {"preprocessing_num_workers": 2}),
        "write preprocessing_num_workers=2 instead",
    ),
    ("max_length", 256, {"max_length": 256}, None),
    ("max_length", None, {"max_length": None}, None),
    ("truncation_mode", "keep_start", {"truncation_mode": "keep_start"}, None),
    ("padding_free", True, {"packing": "packed"}, "write packing='packed' instead"),
    ("pad_to_multiple_of", 8, {}, OUT),
    ("precompute_ref_log_probs", True, {"precompute_ref_log_probs": True}, None),
    ("precompute_ref_batch_size", 4, {}, "per_device_eval_batch_size is used"),
    ("loss_type", ["ipo"], {"objective": "ipo"}, "write objective='ipo' instead"),
    ("loss_type", ["hinge"], {"objective": "dpo-hinge"}, "write objective='dpo-hinge' instead"),
    ("loss_type", "exo_pair", {"objective": "exo"}, "write objective='exo' instead"),
    ("loss_type", "sigmoid", "instead of it write objective: simpo", "instead of it write"),
    (
        *("loss_type", ["sigmoid", "sft"], {"objective": "dpo + sft", "nll": "tokens"}),
        "write objective='dpo + sft', objective_args={'nll': 'tokens'} instead",
    ),
    ("loss_type", ["sigmoid", "dpo"], "name each loss once", "name each loss once"),
    ("loss_weights", [0.5], "give loss_type a list", "give the weights to objective, as {'dpo'"),
    ("ld_alpha", 0.5, {"ld_alpha": 0.5}, f"{OWN}'ld_alpha': 0.5"),
    ("f_divergence_type", "js_divergence", {"f_divergence_type": "js_divergence"}, OWN),
    ("f_alpha_divergence_coef", 0.7, "set f_divergence_type: alpha_divergence beside it", OWN),
    ("label_smoothing", 0.1, {"label_smoothing": 0.1}, OWN),
    ("beta", 0.3, {"beta": 0.3}, None),
    ("use_weighting", True, {"use_weighting": True}, OWN),
    ("discopop_tau", 0.1, {}, "leave it out; dpo has none; it belongs to discopop"),
    ("activation_offloading", True, "use gradient_checkpointing", "use gradient_checkpointing"),
    ("sync_ref_model", True, {"sync_ref_model": True}, None),
    ("ref_model_mixup_alpha", 0.5, {"ref_model_mixup_alpha": 0.5}, None),
    ("ref_model_sync_steps", 9, {"ref_model_sync_steps": 9}, None),
    ("pad_token", "<pad>", {}, OUT),
    # of earlier versions, and of its scripts
    ("max_prompt_length", 33, {"max_prompt_length": 33}, None),
    ("max_completion_length", 9, {"max_completion_length": 9}, None),
    ("reference_free", True, "use simpo, cpo or another objective", "use simpo, cpo or another"),
    ("reference_free", False, {}, OUT),
    (
        *("rpo_alpha", 1.0, {"sft_weight": 1.0, "nll": "tokens"}),
        "write objective_args={'sft_weight': 1.0, 'nll': 'tokens'} instead",
    ),
    ("use_liger_loss", True, {}, OUT),
    ("use_logits_to_keep", True, {}, OUT),
    ("force_use_ref_model", True, {}, OUT),
    ("ref_model_init_kwargs", {"dtype": "float16"}, "give dtype", "give dtype"),
    ("model_adapter_name", "policy", "one reference model", "one reference model"),
    ("ref_adapter_name", "frozen", "one reference model", "one reference model"),
    ("label_pad_token_id", -1, {}, OUT),
    ("use_liger_kernel", False, {"use_liger_kernel": False}, None),
    ("dataset_name", "a/b", {"dataset": "a/b"}, "write dataset='a/b' instead"),
    ("dataset_config", "en", "write it after the name", "write it after the name"),
    ("dataset_streaming", True, "data sets are read whole", "data sets are read whole"),
    ("ignore_bias_buffers", True, "set ddp_broadcast_buffers: false", "ddp_broadcast_buffers"),
    ("lora_task_type", "CAUSAL_LM", {}, OUT),
    ("lora_task_type", "SEQ_CLS", OUT, OUT),
    ("bnb_4bit_quant_storage", "bfloat16", OUT, OUT),
]

#: For objective: cpo, or the one that is given beside it.
CPO: list[Row] = [
    ("max_length", 256, {"max_length": 256}, None),
    ("max_completion_length", 9, {"max_completion_length": 9}, None),
    ("beta", 0.3, {"beta": 0.3}, None),
    ("label_smoothing", 0.1, {"label_smoothing": 0.1}, OWN),
    ("loss_type", "sigmoid", r"or cpo \(TRL's CPOConfig\)", "instead of it write"),
    ("loss_type", "hinge", "or cpo-hinge", "instead of it write"),
    ("loss_type", "ipo", "or cpo-ipo", "instead of it write"),
    ("loss_type", "simpo", "add gamma_beta_ratio", "write objective='simpo' instead"),
    ("disable_dropout", False, {"disable_dropout": False}, None),
    ("cpo_alpha", 0.5, {"alpha": 0.5, "nll": "tokens"}, "objective_args={'alpha': ...} for cpo"),
    ("simpo_gamma", 0.4, "give beta beside it", "give beta beside it"),
    ("generate_during_eval", True, "writes no text", "writes no text"),
    ("is_encoder_decoder", True, "models are decoder-only", "models are decoder-only"),
    ("is_encoder_decoder", False, {}, OUT),
    ("model_init_kwargs", {"dtype": "auto"}, {"dtype": "auto"}, "write dtype='auto' instead"),
    ("trust_remote_code", True, {"trust_remote_code": True}, None),
    ("dataset_num_proc", 2, {"preprocessing_num_workers": 2}, "write preprocessing_num_workers"),
    ("learning_rate", 3e-6, {"learning_rate": 3e-6}, None),
    ("bf16", True, {"bf16": True}, None),
    ("gradient_checkpointing", True, {"gradient_checkpointing": True}, None),
    ("logging_steps", 3, {"logging_steps": 3}, None),
]

SIMPO: list[Row] = [
    ("alpha", 0.0, {}, "leave it out; simpo has none"),
    ("alpha", 0.3, "is objective: alphapo", "leave it out; simpo has none"),
    ("cpo_alpha", 0.5, {"sft_weight": 0.5, "nll": "tokens"}, "{'sft_weight': ...} for simpo"),
    ("label_smoothing", 0.1, {"label_smoothing": 0.1}, OWN),
    ("use_weighting", True, {"use_weighting": True}, OWN),
    ("ld_alpha", 0.5, "simpo knows 1 alone", "leave it out; simpo has none"),
    ("f_divergence_type", "reverse_kl", {}, "leave it out; simpo has none"),
    ("f_divergence_type", "forward_kl", "leave it out", "leave it out; simpo has none"),
]

ORPO: list[Row] = [
    ("beta", 0.3, "write alpha for TRL's beta", "write alpha for TRL's beta"),
    ("max_length", 256, {"max_length": 256}, None),
    ("max_completion_length", 9, {"max_completion_length": 9}, None),
    ("disable_dropout", False, {"disable_dropout": False}, None),
    ("padding_value", 1, {}, OUT),
    ("generate_during_eval", True, "writes no text", "writes no text"),
    ("is_encoder_decoder", True, "models are decoder-only", "models are decoder-only"),
    ("model_init_kwargs", {"dtype": "auto"}, {"dtype": "auto"}, "write dtype='auto' instead"),
    ("trust_remote_code", True, {"trust_remote_code": True}, None),
    ("dataset_num_proc", 2, {"preprocessing_num_workers": 2}, "write preprocessing_num_workers"),
    ("learning_rate", 3e-6, {"learning_rate": 3e-6}, None),
    ("bf16", True, {"bf16": True}, None),
    ("gradient_checkpointing", True, {"gradient_checkpointing": True}, None),
    ("logging_steps", 3, {"logging_steps": 3}, None),
    ("label_smoothing", 0.1, "leave it out", "leave it out; orpo has none"),
]

KTO: list[Row] = [
    (
        "loss_type",
        "kto",
        r"or that with kl_estimate: mismatched \(TRL's KTOConfig",
        "instead of it",
    ),
    (
        *("loss_type", "apo_zero_unpaired", {"objective": "apo-zero-unpaired"}),
        "write objective='apo-zero-unpaired' instead",
    ),
    ("desirable_weight", 1.5, {"desirable_weight": 1.5}, OWN),
    ("undesirable_weight", 0.5, {"undesirable_weight": 0.5}, OWN),
    ("train_sampling_strategy", "sequential", "always drawn in random order", "always drawn in"),
    *(row for row in DPO if row[0] in trl_defaults.read()["KTOConfig"] and row[0] != "loss_type"),
]

TABLES = {"dpo": DPO, "cpo": CPO, "simpo": SIMPO, "orpo": ORPO, "kto": KTO}
CASES = [(objective, *row) for objective, rows in TABLES.items() for row in rows]


def given(objective: str, name: str, value: Any) -> dict[str, Any]:
    """A run's arguments with this one; a loss that is named stands for the objective."""
    named = {} if name == "loss_type" else {"objective": objective}
    return {**HERE, **named, name: value}


def effect(config: PreferenceConfig, name: str) -> Any:
    """A setting's value, or that of the objective's hyperparameter."""
    if name in ("gradient_checkpointing", "activation_checkpointing"):  # by transformers' version
        return bool(config.gradient_checkpointing or config.activation_checkpointing)
    hyperparameters = dataclasses.asdict(config.build_objective().hyperparameters)
    return hyperparameters.get(name, getattr(config, name, None))


@pytest.mark.parametrize(("objective", "name", "value", "outcome", "_"), CASES, ids=str)
def test_in_a_file(objective, name, value, outcome, _):
    notes: list[str] = []
    arguments = given(objective, name, value)
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=outcome):
            build_config(arguments, notes=notes).build_objective()
        return
    config = build_config(arguments, notes=notes)
    assert {n: effect(config, n) for n in outcome} == outcome
    if name not in outcome:
        assert [line for line in notes if line.startswith(f"{name}: ")]


@pytest.mark.parametrize(("objective", "name", "value", "outcome", "said"), CASES, ids=str)
def test_in_python(objective, name, value, outcome, said):
    arguments = given(objective, name, value)
    if said is None:
        config = PreferenceConfig(**arguments)
        assert {n: effect(config, n) for n in outcome} == outcome
        return
    with pytest.raises(UserError) as refused:
        PreferenceConfig(**arguments).build_objective()
    assert said in str(refused.value)


def test_the_table_has_every_argument_that_trl_has():
    theirs = trl_defaults.read()
    for kind, names in {
        "DPOConfig": {"dpo"},
        "CPOConfig": {"cpo", "simpo"},
        "ORPOConfig": {"orpo"},
        "KTOConfig": {"kto"},
    }.items():
        tried = {row[0] for objective in names for row in TABLES[objective]}
        assert set(theirs[kind]) <= tried, kind
    defaults = {n: v for part in theirs.values() if isinstance(part, dict) for n, v in part.items()}
    assert len([row for row in CASES if defaults.get(row[1], ...) != row[2]]) >= 80
