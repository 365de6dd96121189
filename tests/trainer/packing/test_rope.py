"""Rotary frequencies that depend on a batch's longest row are one factor for the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.packing import model_inputs
from widemargin.trainer.packing.rope import fix_rope
from widemargin.trainer.packing.verify import settle_packing

from tests.support.packed_rows import alone
from tests.support.tiny_models import tiny_model, tiny_trainer

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
MODELS: dict[str, Any] = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 128}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    "dynamic qwen2": ("qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
}


def rows(*sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {
            n: torch.randint(3, 300, (k,), generator=draw).tolist()
            for n, k in zip(names, size, strict=True)
        }
        for size in sizes
    ]


def scored(model: Any, packing: Any, pairs: list[dict[str, Any]]) -> torch.Tensor:
    batch = packing.collator(0)(pairs)
    with torch.no_grad():
        logps = model(**model_inputs(batch)).token_logps
    return logps[: batch["cu_seqlens"][1]]


@pytest.mark.parametrize("setting", ["padded", "packed", "prefix_shared"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_pair_does_not_feel_a_long_one_beside_it(kind, setting):
    family, changes = MODELS[kind]
    model = tiny_model(family, **changes).eval()
    short, long = rows((5, 4, 7), (11, 60, 3))
    with torch.no_grad():
        expected = alone(model, [short])[:4]
        between = alone(model, [long])[:60]
    patch_head(model, tail="exact")
    packing = settle_packing(setting, model, pairs_per_batch=2)
    torch.testing.assert_close(scored(model, packing, [short]), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        scored(model, packing, [short, long]), expected, atol=1e-4, rtol=1e-4
    )
    assert between.isfinite().all()


@pytest.mark.parametrize("kind", MODELS)
def test_the_longest_sequence_decides(kind, caplog):
    """A run with long rows has the frequencies that a long sequence alone has."""
    family, changes = MODELS[kind]
    model = tiny_model(family, **changes).eval()
    long = rows((11, 60, 3))
    with torch.no_grad():
        expected = alone(model, long)[:60]
    fix_rope(model, 71)
    assert "sequences of 71 tokens" in caplog.text
    caplog.clear()
    fix_rope(model, 5)
    assert not caplog.text
    with torch.no_grad():
        model(input_ids=torch.arange(5, 12)[None])
        torch.testing.assert_close(alone(model, long)[:60], expected, atol=1e-4, rtol=1e-4)


def test_other_rotary_positions_are_left_alone(caplog):
    fix_rope(tiny_model(), 1000)
    assert not caplog.text


def test_a_run_with_its_reference_has_one_factor(tmp_path):
    family, changes = MODELS["longrope"]
    model = tiny_model(family, **changes)
    reference = tiny_model(family, **changes)
    trainer = tiny_trainer(tmp_path, model, objective="dpo", max_steps=1)
    assert trainer.reference is not None
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)
    with torch.no_grad():
        copy: Any = trainer.reference.model
        ids = torch.arange(5, 60)[None]
        frozen = copy(input_ids=ids).logits
        fix_rope(reference, 20)
        torch.testing.assert_close(reference.eval()(input_ids=ids).logits, frozen)
