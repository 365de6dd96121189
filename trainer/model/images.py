"""What a model's tower makes of images, once for each, however often the rows show it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images.processor import PIXELS, ImageProcessor
from ..errors import UserError


def with_image_features(inner: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an inner model with its images' features, where ``image_index`` is given.

    The tower is called here, and not in the inner model's forward, which would hand it the lengths
    of packed rows of text too.

    Args:
        inner: the model without its head.
        arguments: with what `packing.images` makes.
    """
    index = arguments.get("image_index")
    if index is None:
        return arguments
    if "mm_encoder_outputs" not in inspect.signature(type(inner).forward).parameters:
        raise UserError(
            f"images: take a model that sees them, or pip install -U transformers (5.23 or later); "
            f"{type(inner).__name__} takes no features of images here"
        )
    pixels = {name: arguments[name] for name in PIXELS if name in arguments}
    features = inner.get_image_features(**pixels, return_dict=True)
    features.pooler_output = _repeated(features.pooler_output, index)
    layers = getattr(features, "deepstack_features", None)
    if layers is not None:
        features.deepstack_features = [_repeated(layer, index) for layer in layers]
    rest = {n: value for n, value in arguments.items() if n not in (*PIXELS, "image_index")}
    return rest | {"mm_encoder_outputs": {"image": features}}


def _repeated(features: Any, index: Sequence[int]) -> Any:
    """Features of the images [n] of the index, of a tensor or a list with one each."""
    if isinstance(features, Tensor):
        return features[list(index)]
    return [features[i] for i in index]


@torch.no_grad()
def check_images(
    model: Any, processor: ImageProcessor, row: Mapping[str, Any], scored: Tensor
) -> None:
    """Compare log-probs of a row's chosen answer with those of the model's own logits.

    A family that came to see images in another way is an error here, and not a silently different
    loss.

    Args:
        model: patched, in eval mode.
        row: of the table, with images.
        scored: [tokens] of its chosen answer, by the head in the run's layout.
    """
    prompt, answer = (np.asarray(row[name], np.int64) for name in ("prompt_ids", "chosen_ids"))
    ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
    is_image = torch.isin(ids, torch.tensor(processor.token_ids)).long()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given |= processor.pixels(row["images"])
    given |= {"mm_token_type_ids": is_image} if processor.family.three_axes else {}
    given |= {"token_type_ids": is_image} if processor.family.sees_ahead else {}
    given = {name: value.to(model.device) for name, value in given.items()}
    logits = model(**given, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
    targets = given["input_ids"][0, len(prompt) :, None]
    expected = logits.float().log_softmax(-1).gather(1, targets)[:, 0]
    apart = (scored - expected).abs().mean().item()
    full = logits.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    if not apart <= (1e-3 if full else 0.1):
        raise UserError(
            f"images: leave out rows with images; {type(model).__name__} gives their answers other "
            f"log-probs than its own logits do, by {apart:.2g} on average"
        )
