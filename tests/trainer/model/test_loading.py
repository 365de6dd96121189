"""Model files that are damaged or incomplete."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.loading import changes_tokens, load_model, load_tokenizer
from widemargin.trainer.settings.model import ModelSettings

from tests.support.chat_tokenizers import family_tokenizer
from tests.support.tiny_models import tiny_config, tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path) -> None:
    load_model(tiny_config(folder / "out", model_name_or_path=str(folder)))


@pytest.mark.parametrize("damage", ["empty", "header cut", "data cut", "header damaged"])
def test_damaged_weights_are_an_error_of_ours(saved, damage):
    path = saved / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "header cut": good[:500],
            "data cut": good[:-1000],
            "header damaged": good[:60] + b"\0" + good[61:],
        }[damage]
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        load(saved)


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [("num_hidden_layers", 4, "its files lack"), ("vocab_size", 400, "cannot be loaded")],
)
def test_nothing_is_trained_from_random(saved, setting, value, reason):
    load(saved)
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(UserError, match=reason):
        load(saved)


@pytest.fixture(params=[True, False], ids=["legacy", "not legacy"])
def mistral(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[bool, str]:
    """A folder with Mistral's kind of tokenizer.json, under a class that is rebuilt on loading."""
    family_tokenizer("mistral").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    own = {"tokenizer_class": "LlamaTokenizer", "legacy": request.param}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return request.param, str(tmp_path)


def test_a_tokenizer_as_saved_makes_the_tokens_of_its_file(mistral):
    legacy, folder = mistral
    rebuilt, saved = (
        load_tokenizer(ModelSettings(model_name_or_path=folder, tokenizer_as_saved=as_saved))
        for as_saved in (False, True)
    )
    text = "<s>[INST] yes [/INST] no </s>[INST] maybe [/INST]"
    theirs = family_tokenizer("mistral")(text, add_special_tokens=False)["input_ids"]
    assert saved(text, add_special_tokens=False)["input_ids"] == theirs
    assert (rebuilt(text, add_special_tokens=False)["input_ids"] == theirs) == legacy


def test_a_tokenizer_that_is_not_rebuilt_makes_the_same_tokens(tmp_path):
    family_tokenizer("llama3").save_pretrained(tmp_path)
    settings = ModelSettings(model_name_or_path=str(tmp_path))
    plain = load_tokenizer(settings)
    assert not changes_tokens(plain, load_tokenizer(replace(settings, tokenizer_as_saved=True)))
    assert not changes_tokens(plain, None)  # no tokenizer.json


def test_a_tokenizer_as_saved_stays_so_when_saved_again(mistral, tmp_path):
    _, folder = mistral
    tokenizer = load_tokenizer(ModelSettings(model_name_or_path=folder, tokenizer_as_saved=True))
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(ModelSettings(model_name_or_path=str(tmp_path / "again")))
    text = "<s>[INST] yes"
    assert again.tokenize(text) == tokenizer.tokenize(text)
