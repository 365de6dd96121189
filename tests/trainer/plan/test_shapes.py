"""Models from their configs: those shipped have the published sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from widemargin.trainer.errors import UserError
from widemargin.trainer.plan.estimate import read_settings
from widemargin.trainer.plan.shapes import PUBLISHED, attention_of, find_config, model_size

from tests.support.estimates import CONFIGS, PARAMETERS, settings


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_shipped_shapes_have_the_published_counts(name):
    given = settings(model_name_or_path=name)
    size = model_size(find_config(given, None)[0], given)
    assert size.total == size.trainable == PARAMETERS[name]
    assert size.tied == (name == "google/gemma-2-9b-it")


def test_every_shipped_config_has_a_shape():
    for path in (CONFIGS / "train").glob("*.yaml"):
        name = read_settings(str(path)).model_name_or_path
        assert name in PUBLISHED or path.stem == "quickstart"


def test_numbers_that_json_has_no_sign_for_are_read(tmp_path: Path):
    CONFIG_MAPPING["falcon_h1"](vocab_size=300).save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert find_config(settings(), tmp_path)[0].time_step_limit[1] == float("inf")


def test_a_config_that_its_family_refuses_is_one_line(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": "x"}))
    with pytest.raises(UserError, match="model config: llama"):
        find_config(settings(), tmp_path)


def test_a_model_without_attention_is_refused(tmp_path: Path):
    CONFIG_MAPPING["mamba"](num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a model with attention"):
        find_config(settings(), tmp_path)


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gpt_oss", "eager")])
def test_attention_is_the_one_that_training_takes(family: str, attention: str):
    config: Any = CONFIG_MAPPING[family]()
    assert attention_of(config) == attention
