"""Settings: how values are read, overrides, and that each of ours does something."""

from __future__ import annotations

import ast
import dataclasses
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.integrations import integration_utils
from transformers.utils import import_utils
from widemargin.trainer import train
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings import launch
from widemargin.trainer.settings.checks import checkpointing_options
from widemargin.trainer.settings.coercion import coerced
from widemargin.trainer.settings.config import PreferenceConfig
from widemargin.trainer.settings.files import build_config, load_config
from widemargin.trainer.train import weight_notes


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"learning_rate": "1e-6"}, "learning_rate", 1e-6),
        ({"learning_rate": 1}, "learning_rate", 1.0),
        ({"evaluation_strategy": "no"}, "eval_strategy", "no"),
        ({"save_strategy": False}, "save_strategy", "no"),
        ({"torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
        ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
        ({"overwrite_output_dir": True}, "objective", "simpo"),
        ({"num_train_epochs": 1}, "num_train_epochs", 1),
        ({"max_steps": 3.0}, "max_steps", 3),
        ({"torch_dtype": None}, "dtype", "float32"),
        ({"learning_rate": None}, "learning_rate", 5e-5),
        ({"seed": None}, "seed", 42),
        ({"max_length": None}, "max_length", None),
        ({"dataset_splits": ["train_prefs"]}, "dataset_splits", ["train_prefs"]),
        ({"dataset_mixer": {"a/b": 1}}, "dataset_mixer", {"a/b": 1}),
        ({"dataset_mixer": {"a/b": "5e-1"}}, "dataset_mixer", {"a/b": 0.5}),
        ({"lr_scheduler_kwargs": {"min_lr": "1e-7"}}, "lr_scheduler_kwargs", {"min_lr": 1e-7}),
        ({"objective_args": {"sft_weight": "1e-1"}}, "objective_args", {"sft_weight": 0.1}),
        ({"chat_template_kwargs": {"a": "1e3"}}, "chat_template_kwargs", {"a": "1e3"}),
        ({"chat_date": date(2026, 1, 31)}, "chat_date", "2026-01-31"),
        ({"max_grad_norm": None}, "max_grad_norm", 0.0),
        ({"report_to": None}, "report_to", []),
        ({"fsdp": True}, "fsdp", True),
    ],
)  # fmt: skip
def test_values_are_read_as_users_mean_them(given, field, value):
    assert getattr(build_config({"objective": "simpo", "use_cpu": True, **given}), field) == value


def test_numbers_deep_in_a_mapping():
    given = {"zero_optimization": {"reduce_bucket_size": "5e8"}, "betas": ["9e-1", "auto"]}
    read = coerced("deepspeed", given, dict[str, Any] | str | None)
    assert read == {"zero_optimization": {"reduce_bucket_size": 5e8}, "betas": [0.9, "auto"]}


def test_overrides_win(tmp_path):
    (tmp_path / "c.yaml").write_text("objective: simpo\nbeta: 2\nuse_cpu: true\n")
    config = load_config(tmp_path / "c.yaml", ["--beta=5", "--eval-steps=7", "--run_name=a b"])
    assert (config.beta, config.eval_steps, config.run_name) == (5.0, 7, "a b")


def test_an_override_wins_under_either_name(tmp_path):
    (tmp_path / "c.yaml").write_text("objective: simpo\nuse_cpu: true\nevaluation_strategy: 'no'\n")
    for name in ("eval_strategy", "evaluation_strategy"):
        assert load_config(tmp_path / "c.yaml", [f"--{name}=epoch"]).eval_strategy == "epoch"


def test_what_yaml_cannot_make_a_value_of(tmp_path):
    path = tmp_path / "c.yaml"
    for text in ("chat_template: {{ bos_token }}\n", "run_name: 2024-02-30\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="not valid YAML"):
            load_config(path)
    path.write_text("objective: simpo\n")
    with pytest.raises(UserError, match="beta: the value is not valid YAML"):
        load_config(path, ["--beta=2024-02-30"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run_name": 1234}, "run_name: expected text, got 1234; write it in quotes"),
        ({"max_length": "None"}, "max_length: expected a whole number, got 'None'; write null"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_what_to_write(given, message):
    with pytest.raises(UserError, match=message):
        build_config({"objective": "simpo", "use_cpu": True, **given})


def test_a_file_of_settings_that_is_not_there():
    for given in ("", "nowhere.json"):
        with pytest.raises(UserError, match=f"accelerator_config: '{given}': the file cannot"):
            PreferenceConfig(objective="simpo", use_cpu=True, accelerator_config=given)


def test_apple_gpus_are_left_alone(monkeypatch):
    """Statistics are float64, which they do not have."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert PreferenceConfig(objective="simpo").device.type == "cpu"


def test_trackers_and_kernels_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", list)
    monkeypatch.setattr(import_utils, "is_liger_kernel_available", lambda: False)
    for name, value in (("report_to", "tensorboard"), ("use_liger_kernel", True)):
        with pytest.raises(UserError, match=f"{name}.*not installed"):
            PreferenceConfig(objective="simpo", use_cpu=True, **{name: value})


def test_bfloat16_without_a_gpu_for_it(monkeypatch):
    monkeypatch.setattr(import_utils, "is_torch_bf16_gpu_available", lambda: False)
    for name in ("bf16", "bf16_full_eval"):
        with pytest.raises(UserError, match=f"^{name}: .* set use_cpu: true .* or {name}: false"):
            PreferenceConfig(objective="simpo", **{name: True})
        assert getattr(PreferenceConfig(objective="simpo", use_cpu=True, **{name: True}), name)


def test_deepspeed_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("widemargin.trainer.settings.checks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^deepspeed: .* pip install 'widemargin\[deepspeed\]'"):
        PreferenceConfig(objective="simpo", use_cpu=True, deepspeed="zero3.json")


@pytest.mark.parametrize("name", ["optim", "lr_scheduler_type", "hub_strategy"])
def test_a_choice_that_transformers_does_not_know_is_named(name):
    with pytest.raises(UserError, match=f"^{name}: other is not a valid "):
        PreferenceConfig(objective="simpo", use_cpu=True, run_name="x", **{name: "other"})


def test_checkpointing_takes_no_unknown_arguments():
    """torch would hand them to the layers, which look at none."""
    given = {"objective": "simpo", "use_cpu": True, "gradient_checkpointing": True}
    with pytest.raises(UserError, match="gradient_checkpointing_kwargs: 'reentrant' is not known"):
        PreferenceConfig(**given, gradient_checkpointing_kwargs={"reentrant": False})
    PreferenceConfig(**given, gradient_checkpointing_kwargs={"use_reentrant": True})
    if "every_n_layers" in checkpointing_options():
        with pytest.raises(UserError, match="every_n_layers: expected a whole number from 1 on"):
            PreferenceConfig(**given, gradient_checkpointing_kwargs={"every_n_layers": 0})
        with pytest.raises(UserError, match="offload: expected true or false, got 'no'"):
            PreferenceConfig(**given, gradient_checkpointing_kwargs={"offload": "no"})
    if hasattr(PreferenceConfig, "activation_checkpointing_kwargs"):
        named = {"activation_checkpointing": True, "use_cpu": True, "report_to": "none"}
        for kwargs in ({"every_n_layers": 0}, {"reentrant": False}):
            with pytest.raises(UserError, match="activation_checkpointing_kwargs: "):
                PreferenceConfig(**named, activation_checkpointing_kwargs=kwargs)
        new = {"activation_checkpointing_kwargs": {"every_n_layers": 2}}
        with pytest.raises(UserError, match="write all of it there, or all in activation_"):
            PreferenceConfig(**given, **new, gradient_checkpointing_kwargs={"use_reentrant": True})
        kept = PreferenceConfig(**given, **new).activation_checkpointing_kwargs
        assert kept == {"use_reentrant": False, "every_n_layers": 2}


def test_flash_attention_has_no_full_precision(monkeypatch):
    monkeypatch.setattr("widemargin.trainer.settings.checks._check_flash_attention", lambda: None)
    given = {"objective": "simpo", "use_cpu": True, "attn_implementation": "flash_attention_2"}
    with pytest.raises(UserError, match=r"flash_attention_2 .*set bf16: true"):
        PreferenceConfig(**given)
    for half in ({"bf16": True}, {"dtype": "bfloat16"}, {"dtype": "auto"}):
        PreferenceConfig(**given, **half)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device for it")
def test_flash_attention_of_the_hub_needs_a_device():
    with pytest.raises(UserError, match=r"attn_implementation: a/flash-attn2 needs a GPU; set"):
        PreferenceConfig(
            objective="simpo", bf16=True, use_cpu=True, attn_implementation="a/flash-attn2"
        )


def test_liger_leaves_the_head_alone(monkeypatch):
    monkeypatch.setattr(import_utils, "is_liger_kernel_available", lambda: True)
    config = PreferenceConfig(
        objective="simpo", use_cpu=True, use_liger_kernel=True, liger_kernel_config={"rope": False}
    )
    assert config.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}


SETTINGS_ARE_CALLED = {"self", "args", "config", "settings", "options"}


def test_every_setting_of_ours_is_read_somewhere():
    """No option that does nothing: each field is taken from something that is called settings."""
    package = Path(sys.modules["widemargin.trainer"].__file__ or "").parent
    nodes = (n for path in package.rglob("*.py") for n in ast.walk(ast.parse(path.read_text())))
    read = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and getattr(node.value, "attr", getattr(node.value, "id", "")) in SETTINGS_ARE_CALLED
    }
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name for field in dataclasses.fields(PreferenceConfig)} - inherited
    assert ours - read == set()


def test_parallelism_that_does_not_work_yet(monkeypatch, tmp_path):
    from accelerate.parallelism_config import ParallelismConfig

    with pytest.raises(UserError, match="parallelism_config: leave it out"):
        PreferenceConfig(
            objective="simpo",
            output_dir=str(tmp_path),
            parallelism_config=ParallelismConfig(tp_size=2),
        )
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match="parallelism_config: leave it out"):
        PreferenceConfig(objective="simpo", output_dir=str(tmp_path))


@pytest.fixture
def alone(monkeypatch):
    """A process that no launcher started."""
    for name in launch.RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", launch.ENGINES)
def test_a_launchers_variable_that_was_left_over(alone, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=f"^unset {name}, .*accelerate launch"):
        PreferenceConfig(use_cpu=True)


def test_one_process_trains_whatever_backend_ranks_would_use(alone):
    assert PreferenceConfig(use_cpu=True, ddp_backend="gloo").world_size == 1


def test_unused_parameters_are_looked_for_on_request_only(alone):
    assert PreferenceConfig(use_cpu=True).ddp_find_unused_parameters is False
    asked = PreferenceConfig(use_cpu=True, ddp_find_unused_parameters=True)
    assert asked.ddp_find_unused_parameters is True


def test_a_group_is_left_once(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    launch.leave_group()
    assert not dist.is_initialized()
    launch.leave_group()


def test_the_launchers_precision_is_said(alone, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = PreferenceConfig(use_cpu=True)
    assert config.mixed_precision == "bf16"
    assert weight_notes(config, "float32") == [
        "computes in bf16, as the launcher's mixed_precision says"
    ]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert weight_notes(PreferenceConfig(use_cpu=True, bf16=True), "float32") == []


@pytest.mark.parametrize("name", ["use_peft", "strict_data", "tokenizer_as_saved", "use_cpu"])
def test_a_switch_is_true_or_false(name):
    with pytest.raises(UserError, match=f"{name}: expected true or false, got 'false'"):
        PreferenceConfig(**{"use_cpu": True, name: "false"})


def test_the_first_rank_alone_prints_the_preflight(alone, monkeypatch, capsys):
    monkeypatch.setattr(train, "_preflight", lambda config, script: print("First pair"))
    for rank, printed in ((0, "First pair\n"), (1, "")):
        train.preflight(SimpleNamespace(process_index=rank))  # pyright: ignore[reportArgumentType]
        assert capsys.readouterr().out == printed
