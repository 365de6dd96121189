"""Model files that are damaged or incomplete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.loading import load_model

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
