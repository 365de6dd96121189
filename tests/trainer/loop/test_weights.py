"""Checkpoints of families whose files name weights otherwise than their modules do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.packed_rows import EXPERTS
from tests.support.tiny_images import image_model
from tests.support.tiny_models import parameters_of, tiny_model, tiny_trainer


def fresh(family: str) -> Any:
    return image_model(family) if family == "llava" else tiny_model(family, **EXPERTS)


@pytest.mark.parametrize("family", ["llava", "mixtral"])
def test_their_weights_are_loaded(tmp_path, family):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "packing": "padded"}
    run = tiny_trainer(tmp_path, fresh(family), **settings)
    run.train()
    folder = tmp_path / "checkpoint-2"
    assert load_file(folder / "model.safetensors").keys() - run.model.state_dict().keys()
    again = tiny_trainer(tmp_path, fresh(family), **settings)
    assert not torch.equal(parameters_of(again.model), parameters_of(run.model))
    again._load_from_checkpoint(str(folder))
    assert torch.equal(parameters_of(again.model), parameters_of(run.model))
