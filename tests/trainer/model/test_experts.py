"""Mixtures of experts: which adapters they get by default, and the auxiliary loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.adapters import lora_config, with_adapter
from widemargin.trainer.model.experts import RouterBalance, balance_loss, token_weights
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.packing import PairCollator, model_inputs

from tests.support.packed_rows import EXPERTS as EXPERT_SIZES
from tests.support.packed_rows import token_pairs
from tests.support.tiny_models import tiny_config, tiny_model, tiny_trainer
from tests.support.two_ranks import launch

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "gpt_oss")
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
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


BALANCED = {
    "mixtral": EXPERT_SIZES,
    "qwen2_moe": EXPERT_SIZES
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERT_SIZES | {"moe_intermediate_size": 16},
    "olmoe": EXPERT_SIZES,
    "granitemoe": EXPERT_SIZES,
    "phimoe": EXPERT_SIZES,
    "minimax_m2": EXPERT_SIZES,
    "flex_olmo": EXPERT_SIZES,
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "gpt_oss": EXPERT_SIZES,
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
}


def aux_of(model, rows, **layout):
    batch = PairCollator(0, **layout)(rows)
    return model(**model_inputs(batch), router_weights=token_weights(batch)).aux_loss


@pytest.mark.parametrize("family", BALANCED)
@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
def test_the_auxiliary_loss_is_the_padded_models_own(family, layout):
    model, rows = tiny_model(family, **BALANCED[family]).eval(), token_pairs(4)
    batch = PairCollator(0)(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = model(**inputs, output_router_logits=True, use_cache=False).aux_loss
    (own_gradient,) = torch.autograd.grad(own, model.get_input_embeddings().weight)
    patch_head(model)
    aux = aux_of(model, rows, layout=layout)
    (gradient,) = torch.autograd.grad(aux, model.get_input_embeddings().weight)
    torch.testing.assert_close(aux, own, atol=0, rtol=2e-6)
    # Releases of transformers before 5.23 detach this family's: both are 0 there.
    assert own_gradient.any() or family == "ernie4_5_moe"
    assert (gradient - own_gradient).norm() <= 1e-5 * own_gradient.norm()


def test_filler_pairs_and_padding_weigh_nothing():
    rows = token_pairs(3)
    for layout in ("padded", "packed", "prefix_shared"):
        batch = PairCollator(0, layout=layout)(rows)
        assert token_weights(batch).sum() == batch["decoder_tokens"][1] + (
            sum(len(row["prompt_ids"]) for row in rows) if layout == "prefix_shared" else 0
        )
        filler = PairCollator(0, layout=layout)([row | {"pair_id": -1} for row in rows[:1]])
        assert not token_weights(filler).any()


def test_autocast_rounds_nothing_of_it():
    logits = [torch.randn(24, 5, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    weights = torch.rand(24, generator=torch.Generator().manual_seed(7))
    exact = balance_loss(logits, weights, 2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(balance_loss(logits, weights, 2), exact, rtol=1e-6, atol=0)


def test_the_config_of_a_mixture_inside_another_model_counts():
    config = AutoConfig.for_model("jetmoe", aux_loss_coef=0.03)
    module = type(tiny_model("mixtral", **EXPERT_SIZES)).__module__
    outer: Any = type("Outer", (), {"__module__": module, "config": config})()
    assert RouterBalance(outer, None).coefficient == 0.03


def test_a_coefficient_for_a_dense_member_of_such_a_family_is_refused(tmp_path):
    trainer = tiny_trainer(
        tmp_path, tiny_model("doge", is_moe=False), max_steps=1, router_aux_loss_coef=0.1
    )
    with pytest.raises(UserError, match="this model has no experts"):
        trainer.train()


def test_the_coefficient_is_the_models_own_unless_set():
    model = tiny_model("mixtral", **EXPERT_SIZES, router_aux_loss_coef=0.02)
    assert RouterBalance(model, None).coefficient == 0.02
    assert RouterBalance(model, 0.5).coefficient == 0.5
    assert RouterBalance(model, 0).coefficient == 0
    assert RouterBalance(tiny_model(), None).coefficient == 0
    with pytest.raises(UserError, match="leave it out; LlamaForCausalLM has no such loss"):
        RouterBalance(tiny_model(), 0.1)


def test_the_loss_and_the_log_have_it(tmp_path):
    figures = {}
    for coefficient in (0.0, 0.5):
        model = tiny_model("mixtral", **EXPERT_SIZES)
        trainer = tiny_trainer(tmp_path, model, router_aux_loss_coef=coefficient, max_steps=1)
        trainer.train()
        figures[coefficient] = trainer.state.log_history[0]
    assert "aux_loss" not in figures[0.0]
    aux = figures[0.5]["aux_loss"]
    assert aux > 1  # of a perfectly even router it is the number of experts a token is sent to
    assert figures[0.5]["loss"] == pytest.approx(figures[0.0]["loss"] + 0.5 * aux, rel=1e-5)


def test_a_dense_model_of_such_a_family_trains_without(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model("doge", is_moe=False), max_steps=1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]


def test_a_bias_that_only_chooses_experts_stays():
    model = tiny_model("deepseek_v3", **DEEPSEEK)
    biases = {n: b.clone() for n, b in model.named_buffers() if "e_score_correction_bias" in n}
    assert biases
    patch_head(model)
    batch = PairCollator(0)(token_pairs(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**model_inputs(batch)).token_logps.sum().backward()
    optimizer.step()
    after = dict(model.named_buffers())
    assert all(torch.equal(bias, after[name]) for name, bias in biases.items())


def test_ranks_add_up_to_one_process(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = launch(tmp_path, str(script))
    assert done.returncode == 0, done.stderr[-2000:]


RANKS = """
import torch, torch.distributed as dist
from widemargin.trainer.model.experts import balance_loss
torch.manual_seed(0)
logits = [torch.randn(24, 5) for _ in range(2)]
weights = torch.rand(24)
whole = [part.clone().requires_grad_() for part in logits]
alone = balance_loss(whole, weights, 2)
alone.backward()
dist.init_process_group("gloo")
mine = slice(0, 16) if dist.get_rank() == 0 else slice(16, 24)
own = [part[mine].clone().requires_grad_() for part in logits]
shared = balance_loss(own, weights[mine], 2)
shared.backward()
torch.testing.assert_close(shared, alone)
for part, full in zip(own, whole):
    torch.testing.assert_close(part.grad / 2, full.grad[mine])
dist.destroy_process_group()
"""
