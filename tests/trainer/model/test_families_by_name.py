"""Families by their names: image-text models on texts, and text models of unusual builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, T5Config
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.loading import load_model
from widemargin.trainer.settings.model import ModelSettings

from tests.robustness.families import judge
from tests.support.tiny_models import SHAPE, TOKENIZER, tiny_config, tiny_pairs

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "image_size": 28,
    "num_attention_heads": 2,
    "patch_size": 14,
}
_QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 14}
_SQUARE = {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
IMAGE_TEXT: dict[str, dict[str, Any]] = {
    "mistral3": {
        "text_config": SHAPE | {"model_type": "mistral"},
        "vision_config": _EYES | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 7,
    },
    "qwen2_vl": {
        "text_config": SHAPE | {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}},
        "vision_config": _QWEN | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 1},
    },
    "qwen3_vl": {
        "text_config": SHAPE | {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
        "vision_config": _QWEN
        | {"out_hidden_size": 32, "intermediate_size": 16, "deepstack_visual_indexes": [0],
           "num_position_embeddings": 16},
    },
    "gemma3": {"text_config": SHAPE, "vision_config": _EYES, "mm_tokens_per_image": 4},
    "llama4": {
        "text_config": SHAPE
        | {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
        "vision_config": _EYES | _SQUARE,
    },
}  # fmt: skip


def image_text_model(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **IMAGE_TEXT[family])
    return AutoModelForImageTextToText.from_config(config).float()


@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_an_image_text_model_trains_on_texts_by_its_name(tmp_path, family, caplog):
    folder = str(tmp_path / "model")
    image_text_model(family).save_pretrained(folder)
    trainer = PreferenceTrainer(
        folder, tiny_config(tmp_path / "run", max_steps=1), train_dataset=tiny_pairs(4),
        processing_class=TOKENIZER,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not any("vision" in name or "visual" in name for name in moved)
    left_out = "does not use" in caplog.text
    assert left_out == (family == "llama4")  # its causal class has no vision part


def test_llama4_with_its_vision_part_is_refused(tmp_path):
    with pytest.raises(UserError, match="load it with AutoModelForCausalLM"):
        PreferenceTrainer(
            image_text_model("llama4"), tiny_config(tmp_path), train_dataset=tiny_pairs(4),
            processing_class=TOKENIZER,
        )  # fmt: skip


def test_a_model_without_a_causal_head_is_refused_by_its_name(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no causal head for t5"):
        load_model(ModelSettings(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("family", ["gemma3n_text", "doge", "rwkv", "blt"])
def test_text_models_of_unusual_builds_are_right(family):
    result = judge(family)
    assert result["status"] == "right", result["reason"]


def test_modernbert_as_a_decoder_is_refused():
    result = judge("modernbert-decoder")
    assert result["status"] == "refused"
    assert "take another one; log-probs from the head differ" in result["reason"]
