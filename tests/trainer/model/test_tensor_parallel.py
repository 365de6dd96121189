"""The patched head of models that transformers' ``tp_plan`` splits over two ranks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.tiny_models import tiny_model
from tests.support.two_ranks import launch

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "uneven": ("llama", {"vocab_size": 369}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "softcap": ("gemma2", {"final_logit_softcapping": 3.0}),
    "scale": ("cohere", {"logit_scale": 0.25}),
    "bias": ("phi", {}),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found, see `tensor_parallel_ranks`."""
    folder = tmp_path_factory.mktemp("models")
    for name, (family, changes) in MODELS.items():
        tiny_model(family, **changes).save_pretrained(folder / name)
    done = launch(folder, "-m", "tests.support.tensor_parallel_ranks", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.costly
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_one_model(ranks, name):
    for found in ranks:
        errors = found["models"][name]
        if errors is None:
            pytest.skip("this version of transformers does not split such a vocabulary")
        assert errors["logps"] < 5e-6
        assert errors["mean_logits"] < 5e-6
        assert errors["gradients"] < 5e-6
        assert errors["written"]


@pytest.mark.costly
def test_every_rank_refuses(ranks):
    for found in ranks:
        assert "leave them out" in found["refused"]["with_figures"]
        assert "this trainer gives each rank other pairs" in found["refused"]["trained"]
        assert "splits lm_head's rows" in found["refused"]["by_columns"]
