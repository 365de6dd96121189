"""Settings without a use in a run are said, or refused."""

from __future__ import annotations

import logging

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings.config import PreferenceConfig
from widemargin.trainer.settings.unused import USES, unused_notes

from tests.support.tiny_models import tiny_trainer

SAID = [
    ({"use_dora": True, "lora_r": 8}, "lora_r, use_dora: do nothing here; to use: set use_peft"),
    ({"use_rslora": True}, "use_rslora: does nothing here; to use: set use_peft: true"),
    ({"lora_target_parameters": ["a"]}, "lora_target_parameters: does nothing here"),
    ({"bnb_4bit_quant_type": "fp4"}, "set load_in_4bit: true"),
    ({"ref_model_sync_steps": 9, "objective": "dpo"}, "set sync_ref_model: true"),
    ({"precompute_ref_log_probs": True}, "take an objective with a reference"),
    ({"eval_samples_temperature": 0.5}, "set eval_samples above 0"),
    ({"head_tail": "exact", "head_tail_eps": 0.1}, "set head_tail: mean"),
    ({"fp16": True}, "fp16: does nothing here; to use: train on a GPU"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "set lr_scheduler_type: constant_with"),
    (
        {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"min_lr": 1e-8}},
        "lr_scheduler_kwargs: does nothing here",
    ),
    ({"optim": "adamw_torch", "optim_args": "beta2=0.95"}, "adam_beta2 and adam_epsilon"),
]
USED = [
    {"use_dora": True, "lora_r": 8, "use_peft": True},
    {"ref_model_sync_steps": 9, "objective": "dpo", "sync_ref_model": True},
    {"precompute_ref_log_probs": True, "objective": "dpo"},
    {"head_tail_eps": 0.1},
    {"lora_r": 16, "use_dora": False},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-8}},
    {"optim": "rmsprop", "optim_args": "momentum=0.9"},
]


def notes(given: dict) -> list[str]:
    config = PreferenceConfig(**{"objective": "simpo", "use_cpu": True, **given})
    return unused_notes(config, config.build_objective())


@pytest.mark.parametrize(("given", "line"), SAID, ids=str)
def test_what_does_nothing_is_said(given, line):
    (said,) = notes(given)
    assert line in said


@pytest.mark.parametrize("given", USED, ids=str)
def test_what_is_used_is_not(given):
    assert notes(given) == []


def test_a_cpu_computes_in_float32_whatever_fp16_says(monkeypatch):
    assert PreferenceConfig(objective="simpo", use_cpu=True, fp16=True).mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert PreferenceConfig(objective="simpo", use_cpu=True).mixed_precision == "no"


def test_the_table_names_settings_that_there_are():
    names = [name for group, *_ in USES for name in group]
    assert set(names) <= {*PreferenceConfig.__dataclass_fields__}
    assert {"lora_r", "use_dora", "use_rslora", "lora_target_parameters"} <= set(names)


@pytest.mark.parametrize("given", [{"ref_model_name_or_path": "a/b"}, {"sync_ref_model": True}])
def test_a_reference_that_the_objective_cannot_use_is_refused(given):
    with pytest.raises(UserError, match="leave it out"):
        notes(given)


def test_a_trainer_warns(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tiny_trainer(tmp_path, use_dora=True)
    assert "use_dora: does nothing here" in caplog.text
