"""The twins of the published scripts: their defaults, what they depart from, and who is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from widemargin.trainer.settings.config import PreferenceConfig
from widemargin.trainer.settings.files import build_config, load_config
from widemargin.trainer.settings.published.scripts import (
    departures,
    is_mistral,
    kept_defaults,
    published_steps,
)

SCRIPTS = ["run_lmpo", "run_simpo", "run_xpo"]
HERE = {"use_cpu": True, "report_to": "none"}
XPO = {"trainer_type": "simpo", "loss_type": "gm-simpo"}


def config_of(script: str | None, **given) -> PreferenceConfig:
    named = XPO if script == "run_xpo" and "loss_type" not in given else {}
    return build_config({**HERE, **named, **given}, script=script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_file_leaves_out_is_as_in_the_scripts(script):
    config = config_of(script)
    assert (config.chat_rendering, config.head_tail) == ("separate", "exact")
    assert (config.max_length, config.max_prompt_length) == (512, 128)
    assert (config.beta, config.gamma_beta_ratio) == (2.0, 0.25)
    assert config.resume_from_checkpoint == "auto"
    assert config.tokenizer_as_saved
    assert config.auto_insert_empty_system_msg
    own = {"lmpo": {"zscore_bias_correction": False}, "gamma-simpo": {"tau": 1.0}}
    assert config.objective_args == own.get(str(config.objective), {})


GIVEN = {
    "chat_rendering": "joint",
    "head_tail": "mean",
    "max_length": 100,
    "max_prompt_length": 50,
    "beta": 3.0,
    "gamma_beta_ratio": 0.5,
    "resume_from_checkpoint": False,
    "tokenizer_as_saved": False,
    "auto_insert_empty_system_msg": False,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_file_says_counts(script):
    config = config_of(script, **GIVEN)
    assert {name: getattr(config, name) for name in GIVEN} == GIVEN


def test_a_null_is_the_scripts_own_default():
    config = config_of("run_simpo", max_length=None, max_prompt_length=None)
    assert (config.max_length, config.max_prompt_length) == (512, 128)


def test_the_other_losses_start_from_the_class_too():
    dpo = config_of("run_xpo", trainer_type="dpo", loss_type="dpo")
    assert (dpo.beta, dpo.objective_args) == (2.0, {"length_norm": True})
    assert config_of("run_xpo", trainer_type="dpo", loss_type="ipo").beta == 0.25
    cpo = config_of("run_xpo", trainer_type="simpo", loss_type="cpo", gamma_beta_ratio=0.5)
    assert cpo.objective_args == {"alpha": 0.5, "length_norm": True}
    assert config_of("run_xpo", trainer_type="simpo", loss_type="orpo").objective_args == {
        "alpha": 0.25
    }
    nested = config_of("run_lmpo", objective_args={"zscore_bias_correction": True})
    assert nested.objective_args == {"zscore_bias_correction": True}


def test_completions_have_no_limit_of_their_own_as_in_the_scripts():
    assert config_of("run_simpo", max_completion_length=7).max_completion_length is None
    assert config_of(None, objective="simpo", max_completion_length=7).max_completion_length == 7


def test_an_adapter_is_on_the_modules_that_peft_chose_there():
    adapted = config_of("run_simpo", use_peft=True)
    assert adapted.lora_target_modules == ["q_proj", "v_proj"]
    assert config_of("run_simpo").lora_target_modules is None
    assert config_of("run_simpo", use_peft=True, lora_target_modules=["up_proj"]) is not None


NAMES = [
    ("mistralai/Mistral-7B-Instruct-v0.2", True),
    ("mistralai/Mixtral-8x7B-Instruct-v0.1", True),
    ("me/my-MISTRAL", True),
    ("/runs/mistral/llama3", False),
    ("/runs/llama/mistral-7b/", True),
    ("./mistral-runs/zephyr", False),
    ("alignment-handbook/zephyr-7b-sft-full", False),
    (None, False),
]


@pytest.mark.parametrize(("name", "mistral"), NAMES)
def test_mistral_in_the_name(name, mistral):
    assert is_mistral(name) == mistral
    config = config_of("run_simpo", model_name_or_path=name)
    assert config.chat_template == ("mistral" if mistral else None)
    template = "{{ messages }}"
    own = config_of("run_simpo", model_name_or_path=name, chat_template=template)
    assert own.chat_template == template


# pairs, pairs a step, accumulation, epochs -> steps, counted by hand as transformers 4 did
COUNTS = [
    ((256, 128, 16, 1), 2),
    ((257, 128, 16, 1), 2),
    ((255, 128, 16, 1), 2),  # the last micro-batch is not whole
    ((250, 128, 16, 1), 2),
    ((248, 128, 16, 1), 1),  # 31 micro-batches
    ((3, 128, 16, 1), 1),
    ((257, 128, 16, 3), 6),
    ((257, 128, 16, 0.5), 1),
    ((10, 3, 1, 1), 4),
]


@pytest.mark.parametrize(("run", "steps"), COUNTS, ids=str)
def test_steps_as_the_scripts_counted_them(run, steps):
    assert published_steps(*run) == steps


OF_A_RUN = [
    ("run_lmpo", {}, "2e-5 of z"),
    ("run_xpo", {"trainer_type": "dpo", "loss_type": "kto"}, "0.6 to 0.7 of its norm"),
    ("run_xpo", {"trainer_type": "dpo", "loss_type": "r-dpo"}, "100 tokens more are 1.0"),
    ("run_xpo", {"trainer_type": "dpo", "loss_type": "gm-dpo"}, "eight random numbers"),
    ("run_xpo", {"loss_type": "simpo", "label_smoothing": 0.1}, "undone by label_smoothing: 0"),
    ("run_xpo", {"loss_type": "b-simpo"}, "at least one pair"),
    ("run_xpo", {"loss_type": "cpo", "label_smoothing": 0.1}, "smoothing counts for cpo"),
    ("run_simpo", {"objective": "gm-dpo + sft"}, "eight random numbers"),
    ("run_simpo", {"objective": "simpo + sft", "label_smoothing": 0.1}, "keeps the margin's sign"),
    ("run_simpo", {"flip": 0.1}, "undone by flip: 0"),
    ("run_simpo", {"sft_weight": 0.1, "nll": "answers"}, "averages over each chosen answer"),
    ("run_simpo", {"num_train_epochs": 2}, "smaller step of their own"),
    ("run_simpo", {}, "undone by packing: padded"),
]


@pytest.mark.parametrize(("script", "given", "line"), OF_A_RUN, ids=str)
def test_a_departure_is_listed_where_a_run_has_it(script, given, line):
    assert [each for each in departures(config_of(script, **given)) if line in each]
    plain = {"packing": "padded", "num_train_epochs": 1}
    other = departures(config_of("run_simpo" if script == "run_lmpo" else "run_lmpo", **plain))
    assert not [each for each in other if line in each]


def test_an_alias_has_the_departures_of_its_objective():
    lines = {
        name: departures(config_of("run_simpo", objective=name))
        for name in ("gm-simpo", "gamma-simpo")
    }
    assert lines["gm-simpo"] == lines["gamma-simpo"]


def test_every_switch_is_a_setting_and_undoes_its_line():
    for line in departures(config_of("run_simpo", num_train_epochs=2, flip=0.1, sft_weight=0.5)):
        if "[undone by " in line:
            name, value = line.partition("[undone by ")[2].rstrip("]").split(": ")
            undone = config_of("run_simpo", **{"num_train_epochs": 2, "flip": 0.1, name: value})
            assert line not in departures(undone), name


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(f"{text}\nuse_cpu: true\nreport_to: none\n")
    return path


def test_the_first_lines_say_it(tmp_path, capsys):
    file = write(tmp_path, "dataset_mixer: {a/b: 1.0}\ntorch_dtype: null\nbeta: 2.0")
    load_config(file, script="run_simpo")
    printed = capsys.readouterr().out
    assert "  head_tail: exact, as the published script had it\n" in printed
    assert "Where this run departs from scripts/run_simpo.py\n  pairs share rows" in printed
    assert "[undone by packing: padded]" in printed

    load_config(file, ["--objective=lmpo"])
    printed = capsys.readouterr().out
    assert "Kept from here, not from the published scripts\n" in printed
    assert "  chat_rendering: joint; there separate\n" in printed
    assert "  zscore_bias_correction: true; there false\n" in printed
    assert "departs" not in printed

    load_config(write(tmp_path, "objective: simpo\ndataset_mixer: {a/b: 1.0}"))
    assert capsys.readouterr().out == ""


def test_kept_defaults_name_what_differs_alone():
    lines = kept({"head_tail": "exact", "chat_rendering": "joint", "max_prompt_length": 99})
    assert not [line for line in lines if line.startswith(("head_", "chat_", "max_prompt"))]
    assert "resume_from_checkpoint: null; there auto" in lines
    assert "max_length: 2048; there 512" in lines
    assert "max_length: null; there 512" in kept({"max_length": None})
    assert "gamma_beta_ratio: 0.5; there 0.25" in lines
    assert "beta: 2.0; there 2.0" not in lines
    given = kept({"beta": 2.0, "gamma": 1.0, "head_tail": "mean", "max_length": 99})
    assert not [line for line in given if line.startswith(("gamma", "head_tail", "max_length"))]


def test_kept_defaults_are_those_of_the_files_script():
    xpo = kept({"trainer_type": "dpo", "loss_type": "dpo"})
    assert {"beta: 0.1; there 2.0", "length_norm: false; there true"} <= set(xpo)
    assert "zscore_bias_correction: true; there false" in kept({"objective": "lmpo"})
    assert not [line for line in xpo if line.startswith("zscore")]
    mistral = kept({"model_name_or_path": "mistralai/Mistral-7B", "use_peft": True})
    assert "chat_template: null; there mistral" in mistral
    assert "lora_target_modules: null; there ['q_proj', 'v_proj']" in mistral


def kept(given: dict[str, Any]) -> list[str]:
    named = {} if {"objective", "loss_type"} & given.keys() else {"objective": "simpo"}
    return kept_defaults(config_of(None, **named, **given), given)
