"""Images in packed rows: what the model gives each conversation alone, each image seen once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from widemargin.trainer.data import DataSettings, tokenize_pairs
from widemargin.trainer.data.images.processor import ImageProcessor
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.head import inner_model, patch_head
from widemargin.trainer.packing import PairCollator, model_inputs
from widemargin.trainer.packing.images import prompt_positions
from widemargin.trainer.packing.varlen import takes_varlen

from tests.support.tiny_images import (
    image_model,
    image_pairs,
    image_processor,
    image_rows,
    own_logps,
)

BOUND = 5e-6
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LAYOUTS = {
    "padded": ("padded", "dense"),
    "packed": ("packed", "varlen"),
    "shared": ("prefix_shared", "varlen"),
    "masked": ("prefix_shared", "dense"),
}


@cache
def tokenized(family: str) -> list[dict[str, Any]]:
    """The rows of `image_pairs` as batches get them."""
    tokenizer: Any = image_processor(family).tokenizer
    tokenizer.processor = image_processor(family)
    table, _ = tokenize_pairs(image_pairs(), tokenizer, DataSettings())
    return PairRows(table).__getitems__(list(range(len(table))))


def gradient(model: Any) -> torch.Tensor:
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(parts)


@cache
def alone(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs by the model's own logits, and the gradient of their sum."""
    model, processor = image_model(family).eval(), image_processor(family)
    parts = []
    for side in ("chosen", "rejected"):
        for raw, row in zip(image_rows(), tokenized(family), strict=True):
            ids, logps = own_logps(model, processor, raw, side)
            prompt, answer = (row[name].tolist() for name in ("prompt_ids", f"{side}_ids"))
            assert ids[: len(prompt) + len(answer)] == prompt + answer
            parts.append(logps[len(prompt) - 1 : len(prompt) + len(answer) - 1])
    logps = torch.cat(parts)
    logps.sum().backward()
    return logps.detach(), gradient(model)


def batch_of(family: str, layout: str) -> dict[str, Any]:
    collator = PairCollator(0, layout=LAYOUTS[layout][0], rows=LAYOUTS[layout][1])
    collator.images = ImageProcessor(image_processor(family))
    return collator(tokenized(family))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_rows_give_what_the_model_gives_each_conversation(family, layout):
    if family == "gemma3" and layout != "padded":
        pytest.skip("tokens of an image see later ones")
    model = image_model(family).eval()
    patch_head(model, tail="exact")
    takes_varlen("sdpa")
    seen: list[int] = []
    inner = inner_model(model)
    features = inner.get_image_features

    def counting(pixel_values: Any, image_grid_thw: Any = None, **options: Any) -> Any:
        seen.append(len(pixel_values if image_grid_thw is None else image_grid_thw))
        grids = {} if image_grid_thw is None else {"image_grid_thw": image_grid_thw}
        return features(pixel_values=pixel_values, **grids, **options)

    inner.get_image_features = counting
    batch = batch_of(family, layout)
    logps = model(**model_inputs(batch)).token_logps
    logps.sum().backward()
    expected, expected_gradient = alone(family)
    assert (logps - expected).abs().max() < BOUND
    apart = gradient(model) - expected_gradient
    assert apart.norm() / expected_gradient.norm() < BOUND
    assert seen == [sum(len(row["images"]) for row in image_rows())]


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_positions_are_the_models_own(family):
    model, processor = image_model(family), ImageProcessor(image_processor(family))
    for row in tokenized(family):
        ids = np.concatenate([row["prompt_ids"], row["chosen_ids"]])
        is_image = np.isin(ids, processor.token_ids)
        grids = processor.pixels(row["images"])["image_grid_thw"]
        expected, _ = inner_model(model).get_rope_index(
            torch.tensor(ids)[None], torch.tensor(is_image).int()[None], image_grid_thw=grids
        )
        table, following = prompt_positions(
            np.asarray(row["prompt_ids"]), grids.numpy(), processor.token_ids, processor.merged
        )
        begin = len(row["prompt_ids"])
        assert np.array_equal(table, expected[:, 0, :begin])
        assert (expected[:, 0, begin:] == following + torch.arange(len(ids) - begin)).all()


def test_an_answer_sees_the_images_of_its_own_prompt_alone():
    model = image_model("qwen2_vl").eval()
    patch_head(model, tail="exact")
    takes_varlen("sdpa")
    batch = batch_of("qwen2_vl", "shared")
    before = model(**model_inputs(batch)).token_logps
    begins = batch["image_grid_thw"].prod(1).cumsum(0)
    batch["pixel_values"][begins[-2] :] += 1.0  # the last row's only image
    changed = model(**model_inputs(batch)).token_logps != before
    bounds = batch["cu_seqlens"]
    for i in range(8):
        assert changed[bounds[i] : bounds[i + 1]].any() == (i % 4 == 3)


def test_rows_with_images_need_a_processor():
    with pytest.raises(UserError, match="set its images to an ImageProcessor"):
        PairCollator(0)(tokenized("llava"))
