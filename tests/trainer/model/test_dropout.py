"""Dropout: none is left, whatever a family calls it, and what is left is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.loading import disable_dropout
from widemargin.trainer.model.trial import check_no_dropout

from tests.support.tiny_models import tiny_model, tiny_trainer

GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_dropout": 0.5}),
    ("gpt2", {**GPT, "attn_pdrop": 0.5}),
    ("gpt_bigcode", {**GPT, "attn_pdrop": 0.5}),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.5, "attention_dropout": 0.5}),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5, "num_hidden_layers": 8}),
    ("xglm", {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2, "dropout": 0.5}),
    ("bloom", {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ("starcoder2", {"residual_dropout": 0.5, "embedding_dropout": 0.5}),
    ("persimmon", {"attention_dropout": 0.5}),
    ("biogpt", {"activation_dropout": 0.5}),
    ("gpt_neox", {"attention_dropout": 0.5, "hidden_dropout": 0.5}),
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda value: str(value)[:30])
def test_two_forwards_in_training_mode_agree(family, changes, attention):
    model = tiny_model(family, **changes).train()
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        pytest.skip(f"{family} has no {attention}")
    with pytest.raises(UserError, match="disable_dropout: set the dropout"):
        check_no_dropout(model)
    disable_dropout(model)
    check_no_dropout(model)


def test_what_remains_is_an_error_of_the_trainer(tmp_path):
    model = tiny_model()
    inner: Any = model.model
    inner.layers[0].register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.5, module.training)
    )
    with pytest.raises(UserError, match="still random in training mode"):
        tiny_trainer(tmp_path, model)
    tiny_trainer(tmp_path, model, disable_dropout=False)


def test_an_adapters_dropout_is_meant_and_random_numbers_stay(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    trainer = tiny_trainer(tmp_path, use_peft=True, lora_dropout=0.5)
    model: Any = trainer.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    torch.manual_seed(3)
    check_no_dropout(model)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
