"""TRL's files and arguments: no other loss in silence, and keys that explain themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import HfArgumentParser
from widemargin.trainer import PreferenceConfig
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings.files import build_config
from widemargin.trainer.settings.published.loss_type import MEANINGS

from docs import trl_defaults

HERE = {"use_cpu": True, "report_to": "none"}

AMBIGUOUS = [
    ({"loss_type": "sigmoid"}, "write objective: simpo .*dpo .*or cpo"),
    ({"loss_type": "sigmoid", "rpo_alpha": 1.0}, r"\(rpo_alpha is TRL's\)"),
    ({"loss_type": "sigmoid", "cpo_alpha": 1.0}, r"\(cpo_alpha is TRL's\)"),
    ({"loss_type": "sigmoid", "precompute_ref_log_probs": True}, "write objective: .*dpo"),
    ({"loss_type": "hinge"}, "hinge .SimPO's., dpo-hinge"),
    ({"loss_type": "hinge", "cpo_alpha": 1.0}, "or cpo-hinge .TRL's CPOConfig"),
    ({"loss_type": "ipo"}, "write objective: ipo"),
    ({"loss_type": "ipo", "cpo_alpha": 1.0}, "or cpo-ipo .TRL's CPOConfig"),
    ({"loss_type": "kto"}, "write objective: kto"),
    ({"loss_type": "0.5*sigmoid+sft"}, "loss_type: sigmoid means another loss"),
    ({"loss_type": "simpo + sft"}, "add gamma_beta_ratio"),
    ({"loss_type": "simpo"}, "add gamma_beta_ratio"),
    ({"loss_type": "simpo", "beta": 0.1, "cpo_alpha": 0.0}, "simpo_gamma: .in TRL 0.5"),
    ({"loss_type": "simpo", "beta": 0.1, "simpo_gamma": 0.5}, "write cpo_alpha: 1.0, or 0.0"),
    ({"loss_type": "orpo", "beta": 0.05}, "write alpha in place of beta"),
]


@pytest.mark.parametrize(("given", "message"), AMBIGUOUS, ids=str)
def test_a_loss_that_libraries_mean_differently_is_asked_about(given, message):
    with pytest.raises(UserError, match=message):
        build_config(HERE | given)


@pytest.mark.parametrize("script", ["run_simpo", "run_lmpo", "run_xpo"])
def test_trls_keys_make_it_doubtful_in_a_twin_too(script):
    with pytest.raises(UserError, match="rpo_alpha is TRL's"):
        build_config(HERE | {"loss_type": "sigmoid", "rpo_alpha": 1.0}, script=script)


FOREIGN = [
    (
        {
            "stage": "dpo",
            "pref_beta": 0.1,
            "pref_loss": "simpo",
            "simpo_gamma": 0.5,
            "cutoff_len": 9,
        },
        ("stage.*'objective'", "pref_beta.*'beta'", "pref_loss.*'objective'", "len.*'max_length'"),
    ),
    (
        {"base_model": "x", "rl": "simpo", "rl_beta": 0.1, "simpo_gamma": 0.5, "datasets": [{}]},
        ("base_model.*'model_name_or_path'", "rl'.*'objective'", "rl_beta.*'beta'"),
    ),
    ({"pretrain": "x", "chosen_key": "good"}, ("'model_name_or_path'", "chosen_key.*'columns'")),
]


@pytest.mark.parametrize(("file", "lines"), FOREIGN, ids=["LLaMA-Factory", "axolotl", "OpenRLHF"])
def test_files_of_other_libraries_hear_all_names_at_once(file, lines):
    with pytest.raises(UserError) as told:
        build_config(HERE | file)
    assert all(re.search(line, str(told.value)) for line in lines)


@pytest.mark.parametrize("loss", MEANINGS)
def test_trainer_type_or_objective_answers(loss):
    trainer = "dpo" if loss in ("ipo", "kto") else "simpo"
    assert build_config(HERE | {"loss_type": loss, "trainer_type": trainer}).objective
    objective = {"sigmoid": "dpo"}.get(loss, loss)
    assert build_config(HERE | {"objective": objective}).objective == objective


def test_a_cpo_simpo_file_that_says_everything_is_read_as_trl_reads_it():
    file = {"loss_type": "simpo", "beta": 0.1, "simpo_gamma": 0.5, "cpo_alpha": 1.0}
    config = build_config(HERE | file)
    assert (config.objective, config.gamma_beta_ratio) == ("simpo", 5.0)
    assert config.objective_args == {"sft_weight": 1.0, "nll": "tokens"}


IN_PYTHON = [
    ({"torch_dtype": "bfloat16"}, "torch_dtype: write dtype='bfloat16' instead"),
    ({"evaluation_strategy": "steps"}, "write eval_strategy='steps'"),
    ({"warmup_ratio": 0.1}, "write warmup_steps=0.1"),
    ({"simpo_gamma": 1.0, "beta": 2.0}, "write gamma_beta_ratio=0.5"),
    ({"simpo_gamma": 1.0}, "give beta"),
    ({"loss_type": "sigmoid"}, "loss_type: 'sigmoid' means another loss in each library"),
    ({"loss_type": "sigmoid", "objective": "dpo"}, "leave it out; objective='dpo' names the loss"),
    ({"loss_type": ["gm-dpo"]}, "write objective='gamma-dpo'"),
    ({"loss_type": ["hinge"]}, "write objective='dpo-hinge'"),
    ({"loss_type": "sppo"}, "write objective='sppo'"),
    ({"loss_type": "spo"}, "set objective to one of simpo"),
    ({"tau": 10.0, "objective": "gamma-simpo"}, r"objective_args=\{'tau': 10.0\}"),
    ({"cpo_alpha": 1.0}, "for cpo"),
    ({"padding_value": 0}, "padding_value: leave it out"),
    ({"save_safetensors": False}, "save_safetensors: False cannot be done here"),
    ({"learning_rat": 1e-6}, "did you mean 'learning_rate'"),
    (
        {"torch_dtype": "float16", "no_cuda": True},
        "dtype='float16' instead; no_cuda: write use_cpu",
    ),
]


@pytest.mark.parametrize(("given", "message"), IN_PYTHON, ids=str)
def test_keys_in_python_explain_themselves(given, message):
    with pytest.raises(UserError, match=message):
        PreferenceConfig(**given)


def test_trls_defaults_on_the_page_are_of_the_version_that_is_compared_with():
    """`python -m docs.trl_defaults` writes them, in the benchmarks' environment."""
    root = Path(__file__).resolve().parents[3]
    pinned = re.search(r"trl==([\d.]+)", (root / "constraints.txt").read_text())
    theirs = trl_defaults.read()
    assert pinned is None or theirs["version"] == pinned[1]
    page = (root / "docs" / "migration.md").read_text().partition("### Defaults that differ")[2]
    for row in (
        "`learning_rate` .* 1e-06 .* 5e-05",
        "`simpo_gamma` .* 5.0 at TRL's",
        "`cpo_alpha`",
    ):
        assert re.search(row, page), row


def test_a_classes_defaults_are_read_with_their_factories():
    @dataclass
    class Settings:
        beta: float = 0.1
        loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])

    assert trl_defaults.defaults_of(Settings) == {"beta": 0.1, "loss_type": ["sigmoid"]}


def test_transformers_argument_parser_takes_the_settings(tmp_path):
    """As TRL's scripts parse theirs."""
    parser = HfArgumentParser(PreferenceConfig)  # pyright: ignore[reportArgumentType]
    place = ["--output_dir", str(tmp_path), "--use_cpu"]
    given = ["--objective", "lmpo", "--beta", "2.5", "--resume_from_checkpoint", "auto"]
    (config,) = parser.parse_args_into_dataclasses([*place, *given])
    assert (config.objective, config.beta) == ("lmpo", 2.5)
    assert config.resume_from_checkpoint == "auto"
    mixture = {"objective": {"dpo": 0.8, "sft": 1.0}, "output_dir": str(tmp_path), "use_cpu": True}
    (config,) = parser.parse_dict(mixture)
    assert config.objective == "0.8*dpo + sft"
