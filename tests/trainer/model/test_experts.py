"""Adapters on mixtures of experts: the defaults train, router and experts only when named."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.adapters import lora_config, with_adapter

from tests.support.tiny_models import tiny_config, tiny_model, tiny_trainer

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "gpt_oss")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def learning(model: torch.nn.Module) -> str:
    return " ".join(name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_adapt_attention_and_no_router(family, tmp_path):
    config = tiny_config(tmp_path, use_peft=True)
    adapted = with_adapter(tiny_model(family), lora_config(config))
    names = learning(adapted)
    assert "o_proj.lora_A" in names
    assert ".gate." not in names
    assert ".router." not in names
    assert ".experts" not in names


def test_a_mixture_trains_with_the_defaults(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model("mixtral"), use_peft=True, max_steps=2)
    assert trainer.train().training_loss > 0


def test_experts_train_where_they_are_named(tmp_path):
    named = {"use_peft": True, "lora_target_parameters": EXPERTS}
    with pytest.raises(UserError, match="lora_dropout: set it to 0"):
        with_adapter(tiny_model("mixtral"), lora_config(tiny_config(tmp_path, **named)))
    config = tiny_config(tmp_path, **named, lora_dropout=0.0)
    names = learning(with_adapter(tiny_model("mixtral"), lora_config(config)))
    assert ".experts" in names
    assert "q_proj" in names
    assert ".gate." not in names


def test_names_that_the_user_chose_stay(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    names = learning(with_adapter(tiny_model("mixtral"), config))
    assert "q_proj" in names
    assert "k_proj" not in names


def test_variants_of_lora_reach_peft(tmp_path):
    made = lora_config(tiny_config(tmp_path, use_peft=True, use_rslora=True, use_dora=True))
    assert made.use_rslora
    assert made.use_dora
