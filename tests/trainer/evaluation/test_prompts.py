"""Prompts of the published evaluations: how they begin."""

from __future__ import annotations

from pathlib import Path

import pytest
from widemargin.trainer.data.template import read_chat_template
from widemargin.trainer.evaluation.answering import render
from widemargin.trainer.evaluation.questions import Question
from widemargin.trainer.evaluation.settings import AnswerSettings
from widemargin.trainer.settings.files import read_yaml

from tests.support.chat_tokenizers import family_tokenizer

CONFIGS = sorted((Path(__file__).resolve().parents[3] / "configs" / "eval").glob("*mistral*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("family", ["mistral", "mistral, newer file"])
def test_prompts_of_mistral_models_begin_as_published(path, family):
    """One ``<s>``, and after it the tokens of the text alone, whichever way the tokenizer has."""
    config = read_yaml(path)
    tokenizer = family_tokenizer(family, read_chat_template(config["chat_template"]))
    settings = AnswerSettings(system_prompt=config.get("system_prompt"))
    (prompt,) = render([Question("1", "Is water wet?", {})], settings, tokenizer)
    base = "<|system|>\n</s>\n<|user|>\nIs water wet?</s>\n<|assistant|>\n"
    published = base if path.stem.endswith("base") else "[INST] Is water wet? [/INST]"
    expected = tokenizer(published, add_special_tokens=False)["input_ids"]
    assert prompt == [tokenizer.bos_token_id, *expected]
