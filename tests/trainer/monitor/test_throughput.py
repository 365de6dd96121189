"""Rates, operations and the share of tokens that a layout saves."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.monitor import metrics as throughput
from widemargin.trainer.monitor.console import log_line
from widemargin.trainer.monitor.metrics import Throughput, flops_per_token

from tests.support.tiny_models import tiny_model, tiny_trainer


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_decoder_and_head(tied):
    """By hand: 6 per weight that multiplies a token; the head only where a completion is scored."""
    model = tiny_model(tie_word_embeddings=tied)
    inner = [*model.model.layers.parameters(), *model.model.norm.parameters()]
    head = model.lm_head.weight.numel()
    assert flops_per_token(model) == (6 * sum(p.numel() for p in inner), 6 * head)


def test_frozen_weights_need_no_gradient_of_their_own():
    """Under LoRA: 4 per frozen weight, 6 per one of the adapter's."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    frozen = sum(p.numel() for p in model.model.layers.parameters()) + 32
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert flops_per_token(adapted) == (4 * frozen + 6 * adapter, 4 * model.lm_head.weight.numel())


MIXTURES = {
    "qwen3_moe": {"num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "hunyuan_v1_moe": {"moe_topk": [2, 2]},  # one for each layer
}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_meets_a_few_of_the_experts(family):
    model: Any = tiny_model(family, num_experts=8, **MIXTURES[family])
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    rest = sum(p.numel() for p in [*model.model.layers.parameters(), model.model.norm.weight])
    assert flops_per_token(model)[0] == 6 * (rest - experts + experts / 4)


def test_weights_in_four_bits_count_whole():
    """Two of them share a byte, and their shape stands in the quantization's state."""
    weight: Any = torch.nn.Parameter(torch.zeros(50, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = type("State", (), {"shape": (10, 10)})()
    assert throughput._flops(weight) == 4 * 100


def test_rates(monkeypatch):
    now = iter([10.0, 12.0, 12.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    clock = Throughput(tiny_model(), torch.device("cpu"), 1)
    clock._peak = 1e9
    clock.start()
    counts = {"pairs": 8, "computed_tokens": 60, "tokens": 50, "padded_tokens": 120, "scored": 30}
    rates = clock.report(counts)
    decoder, head = flops_per_token(tiny_model())
    assert rates == pytest.approx(
        {
            "pairs_per_s": 4,
            "tokens_per_s": 25,
            "tokens/computed_vs_padded": 0.5,
            "mfu": (50 * decoder + 30 * head) / 2 / 1e9,
        }
    )


def test_a_run_logs_what_its_layout_computes(tmp_path):
    """One step over all pairs, so the sums are known from the data."""
    trainer = tiny_trainer(
        tmp_path, pairs=6, per_device_train_batch_size=6, max_steps=1, packing="packed"
    )
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "tokens_per_s" in entry)
    lengths = cast(PairRows, trainer.train_dataset).lengths
    real, padded = lengths.alone("packed").sum(), 6 * lengths.alone("padded").max()
    assert logs["tokens/computed_vs_padded"] >= real / padded
    assert logs["tokens_per_s"] / logs["pairs_per_s"] == pytest.approx(real / 6)
    assert "of padded" in log_line(1, logs)
