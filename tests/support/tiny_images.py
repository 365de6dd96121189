"""Tiny image-text models with their processors, and pairs whose prompts show images."""

from __future__ import annotations

import importlib
import io
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, ProcessorMixin

from tests.support.tiny_models import SHAPE
from tests.support.tiny_tokenizers import tiny_tokenizer

MARKS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "boi_token": "<|vision_start|>",
    "eoi_token": "<|vision_end|>",
}
_PARTS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{% if m.content is string %}"
    "{{ m.content | trim }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}IMAGE"
    "{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_EYES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 14, "hidden_size": 32, "intermediate_size": 48}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
VISION: dict[str, dict[str, Any]] = {
    "llava": _EYES | {"model_type": "clip_vision_model", "projection_dim": 32},
    "qwen2_vl": _QWEN | {"embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl": _QWEN | {"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56},
    "qwen3_vl": _QWEN
    | {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "gemma3": _EYES,
}
"""By family, the config of its tower."""


def image_tokenizer(family: str) -> Any:
    """The tiny tokenizer with marks of images, and a template that writes them."""
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(MARKS.values())})
    for name, mark in MARKS.items():
        if family == "gemma3" or name == "image_token":
            setattr(tokenizer, name, mark)
            setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(mark))
    shown = {"gemma3": MARKS["boi_token"], "llava": MARKS["image_token"]}
    around = f"{MARKS['boi_token']}{MARKS['image_token']}{MARKS['eoi_token']}"
    tokenizer.chat_template = _PARTS.replace("IMAGE", shown.get(family, around))
    return tokenizer


def image_processor(family: str) -> Any:
    """The family's own processor class, for images of 28 pixels a side (Qwen's keep their own)."""

    def of(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"transformers.models.{module}"), name)

    tokenizer, sides = image_tokenizer(family), {"height": 28, "width": 28}
    if family == "llava":
        eyes = of("clip.image_processing_pil_clip", "CLIPImageProcessorPil")
        return of("llava", "LlavaProcessor")(
            eyes(size=sides, crop_size=sides), tokenizer, patch_size=14,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )  # fmt: skip
    if family == "gemma3":
        eyes = of("gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil")
        return of("gemma3", "Gemma3Processor")(eyes(size=sides), tokenizer, image_seq_length=4)
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    eyes = of("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil")
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        # Without torchvision there is no processor of videos, which nothing here calls.
        return of(family, f"{name}Processor")(eyes(), tokenizer, None)


def image_model(family: str, attention: str = "sdpa", seed: int = 0) -> Any:
    """A randomly initialised fp32 model for `image_processor`'s images."""
    tokenizer = image_tokenizer(family)
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    text: dict[str, Any] = SHAPE | {"vocab_size": len(tokenizer), "initializer_range": 0.2}
    if family == "llava":
        text["model_type"] = "llama"
    if family.startswith("qwen"):
        text["rope_parameters"] = _ROPE
    config = AutoConfig.for_model(
        family, text_config=text, vision_config=dict(VISION[family]), mm_tokens_per_image=4,
        image_token_id=ids["image_token"], image_token_index=ids["image_token"],
        video_token_id=ids["video_token"], vision_start_token_id=ids["boi_token"],
        vision_end_token_id=ids["eoi_token"], boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    return model.float()


def picture(seed: int, width: int = 56, height: int = 56) -> bytes:
    """A PNG of noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).save(file, "PNG")
    return file.getvalue()


def image_rows(count: int = 4) -> list[dict[str, Any]]:
    """Raw rows; the second shows two images, in Qwen's sizes of 6 and 4 tokens."""
    rows = []
    for i in range(count):
        images = [picture(i, 84 if i % 2 else 56)] + ([picture(10 + i)] if i % 4 == 1 else [])
        asked = [{"type": "text", "text": "What is it?"}, *([{"type": "image"}] * len(images))]
        asked.append({"type": "text", "text": ["yes", "water", "Paris yes", "no no"][i % 4]})
        rows.append(
            {
                "images": [{"bytes": image, "path": None} for image in images],
                "prompt": [{"role": "user", "content": asked}],
                "chosen": [{"role": "assistant", "content": "yes " * (i % 3 + 1) + "Paris."}],
                "rejected": [{"role": "assistant", "content": "no" + " maybe" * (3 - i % 3)}],
            }
        )
    return rows


def image_pairs(count: int = 4) -> Dataset:
    return Dataset.from_list(image_rows(count))


def own_logps(
    model: Any, processor: Any, row: dict[str, Any], side: str
) -> tuple[list[int], Tensor]:
    """A conversation's tokens, and their log-probs by the model's own logits and processor."""
    rendered = processor.tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
    shown = [Image.open(io.BytesIO(image["bytes"])) for image in row["images"]]
    inputs = processor(
        images=[shown], text=[rendered], return_tensors="pt", add_special_tokens=False
    )
    logits = model(**inputs, use_cache=False).logits[0]
    ids = inputs["input_ids"]
    logps = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return ids[0].tolist(), logps
