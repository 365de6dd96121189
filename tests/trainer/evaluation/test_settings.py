"""Settings of the evaluations: the published models' decoding, slips in configs, and the help."""

from __future__ import annotations

from pathlib import Path

import pytest
from widemargin.trainer.evaluation.evaluate_command import (
    ANSWERS_SETTINGS,
    HARNESS_SETTINGS,
    PAIRS_SETTINGS,
)
from widemargin.trainer.evaluation.settings import (
    SECTIONS,
    AnswerSettings,
    HarnessSettings,
    PairSettings,
    answer_settings,
)
from widemargin.trainer.settings.files import read_yaml

from tests.trainer.test_cli import assert_one_line_error

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TRAINED = sorted(path.name for path in (CONFIGS / "train").glob("*-*.yaml"))


@pytest.mark.parametrize("name", TRAINED)
def test_every_published_model_has_its_decoding(name):
    path = str(CONFIGS / "eval" / name)
    training = read_yaml(CONFIGS / "train" / name)
    of = {section: answer_settings(path, section, ["--seed=3"]) for section in SECTIONS}
    for section, settings in of.items():
        assert settings.seed == 3
        assert settings.stop_token_ids
        assert settings.generator == name.removesuffix(".yaml")
        assert settings.chat_template == training.get("chat_template")
        assert (settings.system_prompt == "") == bool(training.get("auto_insert_empty_system_msg"))
        greedy = section == "arena_hard"
        assert (settings.temperature == 0) == greedy
        assert settings.max_new_tokens in ((4096,) if greedy else (2048, 4096))
    model = str(of["alpaca_eval"].model_name_or_path)
    assert model == training["output_dir"] or model.startswith("princeton-nlp/")


def test_eval_configs_are_checked_in_all_their_parts(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("alpaca_eval: {temperature: 1}\narena_hard: {temprature: 1}\n")
    command = ["evaluate", "alpaca-eval", "--config", str(config), "--model", "m"]
    assert_one_line_error(command, "temperature", capsys)
    config.write_text("alpaca_eval: [1]\n")
    assert_one_line_error(command, "alpaca_eval", capsys)


def test_help_names_every_setting():
    for kind, text in (
        (AnswerSettings, ANSWERS_SETTINGS),
        (HarnessSettings, HARNESS_SETTINGS),
        (PairSettings, PAIRS_SETTINGS),
    ):
        own = set(kind.__dataclass_fields__)
        if kind is PairSettings:
            own = {"beta", "packing", "max_tokens_per_batch", "dtype", "device", "max_length"}
        assert {name for name in own if name not in text} == set()
