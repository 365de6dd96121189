"""Which packing is chosen or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma3nTextConfig, LlamaConfig, RwkvConfig
from widemargin.trainer.data.table import PairLengths
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation.pairs import usual_pairs
from widemargin.trainer.packing import choose as packing_choice
from widemargin.trainer.packing.choose import FAMILIES as TESTED
from widemargin.trainer.packing.choose import area_cost, choose_packing

from tests.support.packed_rows import FAMILIES, RELATIVES, family_model
from tests.support.tiny_models import tiny_model


def lengths(prompt: int, completion: int, count: int = 40) -> PairLengths:
    completions = np.full(count, completion)
    return PairLengths(np.full(count, prompt), completions, completions)


CHOICES = [
    pytest.param("sdpa", "cpu", torch.float32, "prefix_shared", "varlen", id="sdpa cpu"),
    pytest.param("sdpa", "cuda", torch.bfloat16, "prefix_shared", "varlen", id="sdpa bf16"),
    pytest.param("sdpa", "cuda", torch.float32, "prefix_shared", "dense", id="sdpa fp32"),
    pytest.param("eager", "cpu", torch.float32, "prefix_shared", "dense", id="eager"),
    pytest.param("flex_attention", "cuda", torch.bfloat16, "prefix_shared", "blocks", id="flex"),
    pytest.param("flex_attention", "cpu", torch.float32, "padded", "dense", id="flex cpu"),
    pytest.param("flash_attention_2", "cuda", torch.bfloat16, "prefix_shared", "varlen", id="fa2"),
    pytest.param("a/flash-attn3", "cuda", torch.bfloat16, "prefix_shared", "varlen", id="hub"),
    pytest.param("paged|eager", "cuda", torch.bfloat16, "padded", "dense", id="unknown"),
]


@pytest.mark.parametrize(("attention", "device", "dtype", "layout", "rows"), CHOICES)
def test_auto(attention, device, dtype, layout, rows):
    config = family_model("llama").config
    packing = choose_packing("auto", config, attention=attention, device=device, dtype=dtype)
    assert (packing.layout, packing.rows) == (layout, rows)
    assert packing.reason
    if layout == "padded":
        with pytest.raises(UserError, match="packing: packed cannot be used here"):
            choose_packing("packed", config, attention=attention, device=device, dtype=dtype)
    named = choose_packing("padded", config, attention=attention, device=device, dtype=dtype)
    assert named.layout == "padded"


def test_dense_masks_go_by_the_lengths():
    """A pair of long answers and no prompt to share costs more in one row than in two."""
    config = family_model("llama").config
    where: dict[str, Any] = {"attention": "eager", "pairs_per_batch": 1}
    shared = choose_packing("auto", config, lengths=lengths(200, 4), **where)
    assert shared.layout == "prefix_shared"
    apart = choose_packing("auto", config, lengths=lengths(1, 400), **where)
    assert apart.layout in ("packed", "padded")
    assert apart.layout != shared.layout


def test_cost_of_attention_follows_from_the_shape():
    """Against operations counted by hand: hidden 4096, 32 heads of 128, 8 of keys, inner 14336."""
    config = tiny_model(
        hidden_size=64, intermediate_size=224, num_attention_heads=4, num_key_value_heads=1,
        head_dim=16, num_hidden_layers=1,
    ).config  # fmt: skip
    per_token = 2 * (64 * 64 * 2 + 2 * 64 * 16 + 3 * 64 * 224)
    assert area_cost(config) == pytest.approx(4 * 64 / per_token)


def test_few_row_lengths_for_flex():
    where: dict[str, Any] = {"attention": "flex_attention", "device": "cuda"}
    packing = choose_packing(
        "auto", family_model("llama").config, lengths=lengths(100, 450), pairs_per_batch=8, **where
    )
    assert packing.shortest_row >= 4000
    assert packing.collator(0).shortest_row == packing.shortest_row
    limited = choose_packing(
        "auto",
        family_model("llama").config,
        lengths=lengths(100, 450),
        pairs_per_batch=8,
        max_tokens=1100,
        **where,
    )
    assert 1100 <= limited.shortest_row < 1500
    assert usual_pairs(lengths(100, 450), 16384) == 14
    assert usual_pairs(lengths(100, 450, 4), 16384) == 4
    assert usual_pairs(lengths(100, 450), 100) == 1


def test_varlen_only_where_it_has_kernels_and_windows(monkeypatch):
    where: dict[str, Any] = {"attention": "sdpa", "device": "cuda", "dtype": torch.bfloat16}
    config = family_model("llama").config
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, rows in (((7, 5), "dense"), ((8, 0), "varlen"), ((9, 0), "varlen")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert choose_packing("auto", config, **where).rows == rows
    monkeypatch.setattr(packing_choice, "knows_windows", lambda: False)
    assert choose_packing("auto", config, **where).rows == "dense"


@pytest.mark.parametrize("wanted", ["packed", "prefix_shared"])
def test_layers_of_unknown_kinds_are_refused(wanted):
    config = tiny_model("qwen3").config
    config.layer_types = ["spiral_attention", "full_attention"]
    with pytest.raises(UserError, match="spiral_attention"):
        choose_packing(wanted, config)
    assert "spiral_attention" in choose_packing("auto", config).reason


def test_recurrent_layers_take_rows_by_their_lengths_alone():
    config = tiny_model("qwen3").config
    config.layer_types = ["linear_attention", "full_attention"]
    chosen = choose_packing("auto", config, attention="sdpa")
    assert (chosen.layout, chosen.rows) == ("prefix_shared", "varlen")
    eager = choose_packing("auto", config, attention="eager")
    assert eager.layout == "padded"
    assert "recurrent layers" in eager.reason
    with pytest.raises(UserError, match="which take no dense masks"):
        choose_packing("packed", config, attention="eager")
    config.layer_types = ["linear_attention", "conv"]
    assert choose_packing("auto", config, attention="eager").rows == "varlen"


def test_a_window_of_an_unknown_family_matters_where_data_is_longer():
    config = tiny_model("starcoder2", sliding_window=64).config
    assert config.model_type not in TESTED
    assert choose_packing("auto", config, lengths=lengths(10, 20)).layout == "prefix_shared"
    for long in (lengths(50, 20), None):
        packing = choose_packing("auto", config, lengths=long)
        assert packing.layout == "padded"
        assert "window" in packing.reason


def test_tested_families_are_tested():
    names = {name for name, _ in (FAMILIES | RELATIVES).values()}
    assert names == TESTED


def test_bidirectional_among_an_images_tokens_alone_packs_text():
    text = LlamaConfig(use_bidirectional_attention="vision")
    assert choose_packing("auto", text).layout == "prefix_shared"
    everywhere = LlamaConfig(use_bidirectional_attention="all")
    assert "attends to later tokens" in choose_packing("auto", everywhere).reason


def test_configs_without_heads_or_with_a_number_a_layer():
    assert area_cost(RwkvConfig()) == 0.0
    listed = Gemma3nTextConfig(
        hidden_size=64, intermediate_size=[96, 48], num_hidden_layers=2, num_attention_heads=4
    )
    assert 0 < area_cost(listed) < 1
