"""What is tried on a model before it trains: positions, what learns, causality, stand-ins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.errors import UserError
from widemargin.trainer.model import trial
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.model.stand_in import stand_in
from widemargin.trainer.model.trial import check_head
from widemargin.trainer.packing.verify import settle_packing

from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs, tiny_trainer

GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}


def tokens(length: int) -> Dataset:
    """Pairs of token ids, one of them with a sequence of ``length``."""
    short = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    return Dataset.from_list([short, short, short | {"rejected_ids": [9] * (length - 2)}])


def trainer_of(model: Any, data: Any, folder: Any, **settings: Any) -> PreferenceTrainer:
    args = tiny_config(folder, max_length=256, max_steps=1, **settings)
    return PreferenceTrainer(model, args, train_dataset=data, processing_class=TOKENIZER)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {**GPT, "max_position_embeddings": 32}),
        ("opt", {**OPT, "max_position_embeddings": 32}),
        ("gptj", {**GPT, "max_position_embeddings": 32, "rotary_dim": 4}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]],
                     "max_position_embeddings": 32}),
    ],
)  # fmt: skip
def test_sequences_beyond_a_models_positions(family, changes, tmp_path):
    with pytest.raises(UserError, match=r"max_length: set it to 32 or less; .* 33 tokens"):
        trainer_of(tiny_model(family, **changes), tokens(33), tmp_path)
    trainer_of(tiny_model(family, **changes), tokens(32), tmp_path).train()


def test_computed_positions_beyond_the_config_are_said(tmp_path, caplog):
    trainer_of(tiny_model(max_position_embeddings=32), tokens(33), tmp_path)
    assert "max_length: set it to 32" in caplog.text


def test_a_model_of_which_nothing_learns(tmp_path):
    folder = tmp_path / "adapter"
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(tiny_model(), adapter).save_pretrained(str(folder))
    with pytest.raises(UserError, match="is_trainable=True"):
        tiny_trainer(tmp_path, PeftModel.from_pretrained(tiny_model(), str(folder)))
    with pytest.raises(UserError, match="requires_grad_"):
        tiny_trainer(tmp_path, tiny_model().requires_grad_(False))
    learning = PeftModel.from_pretrained(tiny_model(), str(folder), is_trainable=True)
    tiny_trainer(tmp_path, learning, max_steps=1).train()
    frozen: Any = tiny_model().requires_grad_(False)
    config = tiny_config(tmp_path)
    held_out = tiny_pairs(4)
    assert PreferenceTrainer(
        frozen, config, eval_dataset=held_out, processing_class=TOKENIZER
    ).evaluate()["eval_loss"]


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    model = tiny_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UserError, match="causal attention"):
        tiny_trainer(tmp_path, model)
    encoder = tiny_model("bert")
    assert not encoder.config.is_decoder
    with pytest.raises(UserError, match=r"call patch_head\(model\) before"):
        check_head(encoder)
    patch_head(encoder)
    with pytest.raises(UserError, match=r"causal attention|own logits"):
        check_head(encoder)


def test_padding_that_the_embedding_has_no_row_for(tmp_path):
    """Padding is masked, so any token of the model's pads as well."""
    import copy

    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"pad_token": "[ANOTHER]"})
    model = tiny_model()
    assert tokenizer.pad_token_id >= model.config.vocab_size
    losses = [
        PreferenceTrainer(
            tiny_model(),
            tiny_config(tmp_path, packing="padded", max_steps=1),
            train_dataset=tiny_pairs(),
            processing_class=own,
        )
        .train()
        .training_loss
        for own in (TOKENIZER, tokenizer)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("qwen3_moe", {"num_experts": 64, "moe_intermediate_size": 512}),
        ("opt", OPT),
        ("phi3", {}),
    ],
)
def test_a_stand_in_has_the_familys_code_and_scores(family, changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.tiny_models import SHAPE

    with torch.device("meta"):
        config = AutoConfig.for_model(family, **SHAPE | changes)
        model = AutoModelForCausalLM.from_config(config)
    state = torch.get_rng_state()
    small: Any = stand_in(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < 2e6
    patch_head(small)
    check_head(small)
    assert settle_packing("auto", small).layout == "prefix_shared"
    assert config.num_hidden_layers == model.config.num_hidden_layers


def test_split_weights_are_tried_on_a_stand_in(tmp_path, monkeypatch):
    args = tiny_config(tmp_path)
    assert trial.trial_model(tiny_model(), args) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("RANK", "0")
    small = trial.trial_model(tiny_model("stablelm"), args)
    packing = settle_packing("auto", tiny_model("stablelm"), sharded=True, stand_in=small)
    assert packing.layout == "prefix_shared"  # an untested family: padded where nothing compares
    small.scoring.logit_scale = 2.0
    with pytest.raises(UserError, match="own logits"):
        trial.try_model(tiny_model("stablelm"), small, args, torch.no_grad())


def test_a_family_without_a_small_model_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(trial, "stand_in", lambda model, device=None: None)
    assert trial.trial_model(tiny_model(), tiny_config(tmp_path)) is None
    assert "are not tried before" in caplog.text
