"""Published settings under old names: what each becomes, what is refused, and the page about it."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainingArguments
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings.config import PreferenceConfig
from widemargin.trainer.settings.files import build_config, load_config
from widemargin.trainer.settings.model import AdapterSettings
from widemargin.trainer.settings.published.keys import TABLE
from widemargin.trainer.settings.published.translation import merge

from docs.migration_table import render
from tests.support.published_files import EARLY, FILES

ROOT = Path(__file__).resolve().parents[3]


def config_of(script: str | None = None, **given) -> PreferenceConfig:
    named = {"objective", "loss_type", "trainer_type"} & given.keys() or script
    default = {} if named else {"objective": "simpo"}
    return build_config({"use_cpu": True, "report_to": "none", **default, **given}, script=script)


def hyperparameters_of(script: str | None = None, **given) -> dict[str, Any]:
    return dataclasses.asdict(config_of(script, **given).build_objective().hyperparameters)


RENAMED = [
    ({"torch_dtype": "bfloat16"}, "dtype", "bfloat16"),
    ({"torch_dtype": None}, "dtype", "float32"),
    ({"evaluation_strategy": "steps"}, "eval_strategy", "steps"),
    ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
    ({"warmup_ratio": "1e-1"}, "warmup_steps", 0.1),
    ({"warmup_ratio": 0.1, "warmup_steps": 0}, "warmup_steps", 0.1),
    ({"warmup_steps": 0, "warmup_ratio": 0.1}, "warmup_steps", 0.1),
    ({"warmup_ratio": 0.1, "warmup_steps": 20}, "warmup_steps", 20),
    ({"warmup_ratio": None}, "warmup_steps", 0),
    ({"use_flash_attention_2": False}, "attn_implementation", None),
    (
        {"use_flash_attention_2": False, "attn_implementation": "sdpa"},
        "attn_implementation",
        "sdpa",
    ),
    ({"dataset_num_proc": 3}, "preprocessing_num_workers", 3),
    ({"beta": 2.0, "gamma": 1.6}, "gamma_beta_ratio", 0.8),
    ({"simpo_gamma": "1.6", "beta": "2"}, "gamma_beta_ratio", 0.8),
    ({"beta": 2.0, "gamma": None}, "gamma_beta_ratio", None),
    ({"dataset_name": "a/b"}, "dataset", "a/b"),
    ({"dataset_test_split": "test_prefs"}, "dataset_splits", ["train", "test_prefs"]),
    ({"dataset_train_split": "train_prefs"}, "dataset_splits", ["train_prefs"]),
    ({"padding_free": True}, "packing", "packed"),
    ({"overwrite_output_dir": True}, "output_dir", "outputs/run"),
    ({"no_cuda": True, "use_cpu": None}, "use_cpu", True),
]


@pytest.mark.parametrize(("given", "name", "value"), RENAMED, ids=lambda v: str(v)[:50])
def test_renamed(given, name, value):
    assert getattr(config_of(**given), name) == value


COMMAS = [
    ("dataset_splits", "train_prefs,test_prefs", ["train_prefs", "test_prefs"]),
    ("lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
    ("lora_target_modules", ".*(q|v)_proj{1,2}", ".*(q|v)_proj{1,2}"),
    ("lora_target_modules", "all-linear", "all-linear"),
    ("report_to", "none", []),
]


@pytest.mark.parametrize(("name", "given", "value"), COMMAS, ids=str)
def test_lists_with_commas_are_read_as_the_handbook_does(tmp_path, name, given, value):
    path = tmp_path / "c.yaml"
    path.write_text("objective: simpo\nuse_cpu: true\nreport_to: none\n")
    assert getattr(load_config(path, [f"--{name}={given}"]), name) == value


def test_an_sft_file_is_refused_with_what_to_use_instead(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text(
        "model_name_or_path: a/b\ndataset_mixer: {HuggingFaceH4/ultrachat_200k: 1.0}\n"
        "dataset_splits: [train_sft, test_sft]\nhub_strategy: every_save\nmax_seq_length: 2048\n"
    )
    for script in (None, "run_simpo"):
        with pytest.raises(UserError, match=r"max_seq_length.*use TRL's SFTTrainer"):
            load_config(path, script=script)


def test_flash_attention_is_asked_for_by_either_name(monkeypatch):
    monkeypatch.setattr("widemargin.trainer.settings.config.check_attention", lambda *_: None)
    for given in ({}, {"attn_implementation": "flash_attention_2"}):
        config = config_of(use_flash_attention_2=True, **given)
        assert config.attn_implementation == "flash_attention_2"


NEUTRAL = {
    "overwrite_output_dir": True,
    "save_safetensors": True,
    "group_by_length": False,
    "half_precision_backend": "auto",
    "logging_dir": "logs",
    "max_target_length": 128,
    "padding_value": 0,
    "label_pad_token_id": -100,
    "generate_during_eval": False,
    "is_encoder_decoder": None,
    "model_init_kwargs": None,
    "dataset_configs": None,
    "base_model_revision": None,
    "truncation_side": "left",
    "text_column": "text",
    "reference_free": False,
    "sync_ref_model": False,
    "f_divergence_type": "reverse_kl",
    "use_liger_loss": True,
    "length_norm": True,
    "label_smoothing": 0,
}


def test_values_that_mean_what_is_done_anyway_change_nothing():
    for objective in ("gamma-simpo", "lmpo"):
        plain = config_of(objective=objective)
        given = config_of(objective=objective, **NEUTRAL)
        assert given.objective_args == plain.objective_args == {}
        assert given.build_objective().hyperparameters == plain.build_objective().hyperparameters


REFUSED = [
    ({"warmup_ratio": 2}, "warmup_ratio: expected a share"),
    ({"warmup_ratio": 1.0}, "warmup_ratio: expected a share"),
    ({"warmup_ratio": -0.1}, "warmup_ratio: expected a share"),
    ({"warmup_ratio": "soon"}, "warmup_ratio: expected a number"),
    ({"warmup_ratio": True}, "warmup_ratio: expected a number"),
    ({"warmup_ratio": 10**400}, "warmup_ratio: expected a number"),
    ({"warmup_ratio": float("nan")}, "warmup_ratio: expected a number"),
    ({"gamma": 1.6}, "gamma: .* give beta"),
    ({"gamma": 1.6, "beta": 2, "gamma_beta_ratio": 0.8}, "gamma and gamma_beta_ratio are both"),
    ({"gamma": 1.6, "beta": 2, "simpo_gamma": 1.7}, "both given"),
    ({"evaluation_strategy": "no", "eval_strategy": "epoch"}, "both given .* keep eval_strategy"),
    ({"use_flash_attention_2": True, "attn_implementation": "sdpa"}, "use_flash_attention_2"),
    ({"generate_during_eval": True}, "generate_during_eval: True cannot be done"),
    ({"reference_free": True}, "reference_free"),
    ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs: leave device_map out"),
    ({"save_safetensors": False}, "save_safetensors: False cannot be done"),
    (
        {"datasets": [{"path": "a/b"}]},
        "datasets: what it says cannot be done here; write dataset_m",
    ),
    ({"env": {"WANDB_API_KEY": "x"}}, "env: what it says cannot be done here; set these"),
    ({"test_split_size": 0.1}, "give a data set to evaluate on as eval_dataset"),
    (
        {"stage": "dpo", "lora_rank": 8, "tau": 1},
        "unknown setting 'stage'; did.*; unknown setting 'lora_rank'; did you mean .*; tau: "
        "simpo has none",
    ),
    ({"wandb_entity": "x"}, r"'wandb_entity'; leave it out \(no setting has a similar name\)"),
    ({"dpo_beta": 5}, "'dpo_beta'; did you mean 'beta'"),
    ({"train_dataset": "a"}, "'train_dataset'; did you mean 'dataset'"),
    ({"ref_model": "a"}, "'ref_model'; did you mean 'ref_model_name_or_path'"),
    ({"lr": 1e-6, "epochs": 1}, "mean 'learning_rate'.*; .* mean 'num_train_epochs'"),
    ({"group_by_length": True}, "group_by_length: True cannot be done"),
    ({"dataset_mixture": {"datasets": [{"id": "a/b"}]}}, "write dataset_mixer .*dataset_splits"),
    ({"max_seq_length": 2048}, "max_seq_length.*write max_length"),
    ({"objective": "simpo", "loss_type": "dpo"}, "loss_type and objective"),
    ({"trainer_type": "ppo"}, "trainer_type: expected one of simpo, dpo"),
    ({"trainer_type": "simpo"}, r"objective: none is named; .*run_simpo.*; otherwise add.*lmpo"),
    ({"trainer_type": "simpo", "loss_type": "dpo"}, "set trainer_type: dpo"),
    ({"trainer_type": "dpo", "loss_type": "gm-simpo"}, "set trainer_type: simpo"),
    ({"trainer_type": "dpo", "loss_type": "hinge"}, "write objective: hinge"),
    ({"trainer_type": "simpo", "loss_type": "dpo + sft"}, "set trainer_type: dpo"),
    ({"loss_type": []}, "objective: name each part once"),
    ({"loss_type": "sppo_soft"}, "'sppo_soft' is not known; did you mean 'sppo'"),
    ({"loss_type": "sigmoid", "cpo_alpha": 1.0}, "write objective: simpo"),
    ({"loss_type": "sigmoid", "precompute_ref_log_probs": True}, "write objective: simpo"),
    ({"objective": "gamma-simpo", "label_smoothing": 0.1}, "label_smoothing: gamma-simpo has none"),
    ({"objective": "simpo", "length_norm": False}, "simpo always uses means"),
    ({"objective": "simpo", "tau": 10}, "tau: simpo has none; it belongs to gamma-simpo"),
    ({"objective": "cpo", "alpha": 1.0, "gamma_beta_ratio": 0.5}, "both given .* keep alpha"),
    ({"beta_ratio": 0.5}, "did you mean 'gamma_beta_ratio'"),
    ({"evaluation_stratgy": "no"}, "did you mean 'evaluation_strategy'"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=lambda v: str(v)[:60])
def test_refused(given, message):
    with pytest.raises(UserError, match=message):
        config_of(**given)


@pytest.mark.parametrize("half", [np.float32(0.5), np.array(0.5), Decimal("0.5"), "0.5", "5e-1"])
def test_what_python_takes_for_a_number_is_one(half):
    assert config_of(warmup_ratio=half).warmup_steps == 0.5
    assert config_of(gamma=half, beta=2.0).gamma_beta_ratio == 0.25


def test_hinge_has_no_form_with_lmpos_margin():
    with pytest.raises(UserError, match="run_simpo"):
        config_of("run_lmpo", loss_type="hinge")


OBJECTIVES = [
    ("run_lmpo", {}, "lmpo"),
    ("run_lmpo", {"loss_type": "sigmoid"}, "lmpo"),
    ("run_simpo", {}, "simpo"),
    ("run_simpo", {"loss_type": "sigmoid"}, "simpo"),
    ("run_simpo", {"loss_type": "hinge"}, "hinge"),
    ("run_simpo", {"objective": "lmpo"}, "lmpo"),
    ("run_xpo", {"trainer_type": "simpo", "loss_type": "gm-simpo"}, "gamma-simpo"),
    ("run_xpo", {"loss_type": "b-simpo", "tau": 0.6}, "beta-simpo"),
    ("run_xpo", {"trainer_type": "dpo"}, "dpo"),
    ("run_xpo", {"trainer_type": "dpo", "loss_type": "sigmoid"}, "dpo"),
    ("run_xpo", {"trainer_type": "dpo", "loss_type": "gm-dpo"}, "gamma-dpo"),
    (None, {"loss_type": ["sigmoid"]}, "dpo"),
    (None, {"loss_type": ["ipo"]}, "ipo"),
    (None, {"loss_type": ["hinge"]}, "dpo-hinge"),
    (None, {"loss_type": ["hinge"], "trainer_type": "dpo"}, "dpo-hinge"),
    (None, {"loss_type": ["hinge"], "trainer_type": "simpo"}, "hinge"),
    (None, {"loss_type": "dpo + sft", "trainer_type": "dpo"}, "dpo + sft"),
    (None, {"objective": "dpo", "trainer_type": "simpo"}, "dpo"),
]


@pytest.mark.parametrize(("script", "given", "name"), OBJECTIVES, ids=str)
def test_objective_by_script_and_loss_type(script, given, name):
    assert config_of(script, **given).build_objective().name == name


def test_one_key_means_different_things_for_different_losses():
    given = {"beta": 10, "gamma_beta_ratio": 0.3, "tau": 3, "label_smoothing": 0}

    def meant(loss: str, trainer: str) -> dict[str, Any]:
        return hyperparameters_of("run_xpo", loss_type=loss, trainer_type=trainer, **given)

    for loss, trainer in (("cpo", "simpo"), ("orpo", "simpo"), ("r-dpo", "dpo")):
        assert meant(loss, trainer)["alpha"] == 0.3
    assert meant("ipo", "dpo")["beta"] == 0.3
    assert meant("dpo", "dpo")["beta"] == 10


def test_a_ratio_is_alpha_only_where_the_objective_has_none_of_its_own(tmp_path):
    both = {"alpha": 0.1, "gamma_beta_ratio": 0.4}
    alphapo = hyperparameters_of(objective="alphapo", **both)
    assert (alphapo["alpha"], alphapo["gamma_beta_ratio"]) == (0.1, 0.4)
    mixed = hyperparameters_of(objective="simpo + cpo", **both)
    assert (mixed["alpha"], mixed["gamma_beta_ratio"]) == (0.1, 0.4)
    assert hyperparameters_of(objective="dpo + cpo", gamma_beta_ratio=0.4)["alpha"] == 0.4
    twin = hyperparameters_of("run_simpo", objective="alphapo")
    assert (twin["alpha"], twin["gamma_beta_ratio"]) == (0.25, 0.25)

    path = tmp_path / "c.yaml"
    for objective in ("alphapo", "simpo + cpo"):
        path.write_text(
            f"objective: {objective}\nalpha: 0.1\ngamma_beta_ratio: 0.4\nuse_cpu: true\n"
        )
        config = load_config(path, ["--alpha=0.2"])
        assert (config.objective_args["alpha"], config.gamma_beta_ratio) == (0.2, 0.4)
    path.write_text("objective: dpo + cpo\nalpha: 0.1\nuse_cpu: true\n")
    assert load_config(path, ["--gamma_beta_ratio=0.3"]).objective_args == {"alpha": 0.3}


@pytest.mark.parametrize("objective", ["cpo", "cpo-hinge", "cpo-ipo", "simpo + cpo"])
def test_cpo_alpha_is_the_alpha_of_cpo(objective):
    assert hyperparameters_of(objective=objective, cpo_alpha=0.3)["alpha"] == 0.3


@pytest.mark.parametrize("objective", ["orpo", "alphapo", "r-dpo", "orpo + sft"])
def test_cpo_alpha_weighs_the_likelihood_beside_another_alpha(objective):
    found = hyperparameters_of(objective=objective, cpo_alpha=0.3, alpha=0.7)
    assert (found["alpha"], found["sft_weight"], found["nll"]) == (0.7, 0.3, "tokens")
    alone = hyperparameters_of(objective=objective, cpo_alpha=0.3)
    assert alone["alpha"] != 0.3
    assert alone["sft_weight"] == 0.3
    file = {"objective": objective, "cpo_alpha": 0.1, "alpha": 0.7}
    assert merge(file, {"cpo_alpha": 0.3}) == file | {"cpo_alpha": 0.3}


def test_length_norm_where_nothing_is_said():
    """Means for the SimPO type's cpo, sums for the DPO type; our own names keep CPO's sums."""

    def means(**given) -> bool:
        return hyperparameters_of(beta=1, **given)["length_norm"]

    assert means(loss_type="cpo", trainer_type="simpo")
    assert not means(loss_type="cpo", trainer_type="simpo", length_norm=False)
    assert not means(objective="cpo")
    assert not means(loss_type="dpo", trainer_type="dpo")
    assert means(loss_type="dpo", trainer_type="dpo", length_norm=True)


def test_trl_names_of_weights():
    cpo = hyperparameters_of(objective="cpo", cpo_alpha=0.5)
    assert (cpo["alpha"], cpo["nll"]) == (0.5, "tokens")
    assert hyperparameters_of(objective="cpo", cpo_alpha=0.5, nll="answers")["nll"] == "answers"
    assert hyperparameters_of(objective="simpo", beta=2.0, cpo_alpha=0.0)["nll"] == "answers"
    with pytest.raises(UserError, match="alpha: in TRL's CPOConfig it is AlphaPO's"):
        hyperparameters_of(objective="cpo", cpo_alpha=0.5, alpha=0.1)
    assert hyperparameters_of(objective="cpo", cpo_alpha=0.5, alpha=0.0)["alpha"] == 0.5
    simpo = hyperparameters_of(objective="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.1)
    assert (simpo["sft_weight"], simpo["gamma_beta_ratio"]) == (0.1, 0.5)
    alphapo = hyperparameters_of(loss_type="alphapo", alpha=0.5, cpo_alpha=1.0, beta=0.1)
    assert (alphapo["alpha"], alphapo["sft_weight"]) == (0.5, 0.0)  # as TRL's class has it
    dpo = hyperparameters_of(objective="dpo", rpo_alpha=1.0, loss_weights=None)
    assert (dpo["sft_weight"], dpo["nll"]) == (1.0, "tokens")


def test_overrides_win_under_any_name(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "loss_type: gm-simpo\ntrainer_type: simpo\nbeta: 10\ngamma: 4\ntau: 10\nlength_norm: true\n"
        "warmup_ratio: 0.1\nuse_flash_attention_2: true\nreport_to: none\nuse_cpu: true\n"
    )
    plain = ["--attn_implementation=sdpa"]
    config = load_config(path, plain)
    assert (config.gamma_beta_ratio, config.attn_implementation) == (0.4, "sdpa")
    assert load_config(path, [*plain, "--gamma_beta_ratio=0.3"]).gamma_beta_ratio == 0.3
    assert load_config(path, [*plain, "--beta=20"]).gamma_beta_ratio == 0.2
    assert load_config(path, [*plain, "--warmup_steps=7"]).warmup_steps == 7
    assert load_config(path, [*plain, "--loss_type=simpo"]).objective == "simpo"
    dpo = load_config(path, [*plain, "--loss_type=dpo", "--trainer_type=dpo"])
    assert (dpo.objective, dpo.gamma_beta_ratio) == ("dpo", None)


def test_an_override_wins_over_a_mixer_and_over_an_objectives_own_settings():
    mixer = {"dataset_mixer": {"a/b": 1}, "seed": 1}
    for name in ("dataset", "dataset_name"):
        assert merge(mixer, {name: "mine.jsonl"}) == {"seed": 1, name: "mine.jsonl"}
    assert merge({"dataset": "a"}, {"dataset_mixer": {"b": 1}}) == {"dataset_mixer": {"b": 1}}
    file = {"objective_args": {"tau": 1, "label_smoothing": 0.1}, "beta": 2}
    merged = merge(file, {"tau": 3})
    assert merged == {"objective_args": {"label_smoothing": 0.1}, "beta": 2, "tau": 3}
    assert file["objective_args"]["tau"] == 1
    ratio = {"gamma_beta_ratio": 0.5}
    assert merge({"loss_type": "cpo", **ratio}, {"alpha": 1}) == {"loss_type": "cpo", "alpha": 1}
    kept = {"objective": "simpo", **ratio}
    assert merge(kept, {"alpha": 1}) == {**kept, "alpha": 1}


def test_an_override_wins_over_the_objectives_own_name_for_it(tmp_path):
    path = tmp_path / "c.yaml"

    def found(file: str, *overrides: str) -> dict[str, Any]:
        path.write_text(f"{file}\nreport_to: none\nuse_cpu: true\n")
        return load_config(path, overrides).objective_args

    r_dpo = "objective: r-dpo\nalpha: 0.1"
    assert found(r_dpo, "--gamma_beta_ratio=0.3") == {"alpha": 0.3}
    assert found("objective: cpo\nbeta: 2\nalpha: 0.1", "--gamma=1") == {"alpha": 0.5}
    assert found("objective: cpo\ncpo_alpha: 0.1", "--gamma_beta_ratio=0.3") == {"alpha": 0.3}
    args = "objective: cpo\nobjective_args: {alpha: 0.1}"
    assert found(args, "--gamma_beta_ratio=0.3") == {"alpha": 0.3}
    assert found("loss_type: [cpo]\ngamma_beta_ratio: 0.1", "--alpha=0.3")["alpha"] == 0.3
    assert found("objective: simpo\nsft_weight: 0.1", "--cpo_alpha=0.3") == {
        "sft_weight": 0.3,
        "nll": "tokens",
    }
    assert found("objective: simpo\ncpo_alpha: 0.1", "--sft_weight=0.3") == {"sft_weight": 0.3}
    assert found("objective: cpo\ncpo_alpha: 0.1", "--sft_weight=0.3") == {
        "alpha": 0.1,
        "sft_weight": 0.3,
        "nll": "tokens",
    }
    for file in (
        r_dpo + "\ngamma_beta_ratio: 0.3",
        "objective: simpo\ncpo_alpha: 1\nsft_weight: 2",
    ):
        with pytest.raises(UserError, match="both given"):
            found(file)


def test_what_became_of_settings_is_printed_once(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(
        "torch_dtype: null\nevaluation_strategy: 'no'\ntau: 1\n"
        "loss_type: simpo\ngamma_beta_ratio: 0.5\n"
    )
    load_config(path, ["--use_cpu=true", "--report_to=none"])
    printed = capsys.readouterr().out
    for line in (
        "  torch_dtype: null -> dtype: float32 (null is float32",
        "  evaluation_strategy: no -> eval_strategy: no\n",
        "  loss_type: simpo -> objective: simpo\n",
        "  tau: 1 -> nothing (simpo does not use it)\n",
    ):
        assert printed.count(line) == 1
    load_config(path, ["--use_cpu=true", "--report_to=none", "--eval_strategy=epoch"])
    assert "evaluation_strategy" not in capsys.readouterr().out


def test_every_published_key_is_in_the_table_or_transformers_own():
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    lora = {field.name for field in dataclasses.fields(AdapterSettings)}
    for settings in (*FILES.values(), *EARLY.values()):
        assert settings.keys() <= TABLE.keys() | theirs | lora


def test_the_table_names_settings_that_exist():
    ours = {field.name for field in dataclasses.fields(PreferenceConfig)}
    ours |= {"tau", "label_smoothing", "sft_weight", "length_norm", "alpha"}
    ours |= {"f_divergence_type", "f_alpha_divergence_coef", "discopop_tau"}
    ours |= {"ld_alpha", "use_weighting"}
    for key in TABLE.values():
        assert not key.becomes or key.becomes in ours, key.name
        assert key.translate is not None or key.becomes, key.name


def test_the_page_is_current():
    page = (ROOT / "docs" / "migration.md").read_text()
    assert page == render(), "run python -m docs.migration_table > docs/migration.md"
