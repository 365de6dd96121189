"""Bytes that a simulated micro-batch holds, against measurements and against each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from widemargin.trainer.data.table import PairLengths
from widemargin.trainer.errors import UserError
from widemargin.trainer.packing.choose import Packing
from widemargin.trainer.parallel.groups import Place
from widemargin.trainer.parallel.rows import SharedRow
from widemargin.trainer.plan import simulation
from widemargin.trainer.plan.batches import micro_batch
from widemargin.trainer.plan.simulation import Checkpointing, Recipe, simulate
from widemargin.trainer.settings.checks import checkpointing_options

from tests.support.estimates import TINY, settings
from tests.support.measured_memory import PACKINGS, estimated_bytes, measured_bytes, small_config

BATCH = micro_batch(
    PairLengths(np.array([5, 9]), np.array([20, 7]), np.array([3, 30])), PACKINGS["prefix_shared"]
)

EACH = Checkpointing(every=1, offload=False)
NAMES = {None: "whole", 1: "checkpointed", 2: "every second", 3: "every third"}


def recipe(config: Any, **changes: Any) -> Recipe:
    given = settings(**changes.pop("settings", {}))
    standard = {"dtype": torch.bfloat16, "autocast": None, "attention": "flash_attention_2"}
    return Recipe(
        **{"config": config, "settings": given, "device": "cuda", "checkpointing": EACH}
        | standard
        | changes
    )


@pytest.mark.costly
@pytest.mark.parametrize("every", [None, 1, 2], ids=NAMES.get)
@pytest.mark.parametrize("layout", list(PACKINGS))
def test_activations_are_those_measured(layout, every):
    if every == 2 and "every_n_layers" not in checkpointing_options():
        pytest.skip("transformers before it took every_n_layers")
    config = small_config()
    estimated = estimated_bytes(config, settings(), layout, every, bf16=False)
    measured = measured_bytes(config, layout, every, bf16=False)
    assert estimated == pytest.approx(measured, rel=0.25)


@pytest.mark.costly
@pytest.mark.parametrize("every", [None, 1], ids=NAMES.get)
def test_activations_of_a_shared_row_are_those_measured(monkeypatch, every):
    """Nothing is sent: gloo's threads free tensors where the profiler does not see it."""

    def unsent(row: SharedRow, parts: torch.Tensor) -> torch.Tensor:
        return parts.clone(memory_format=torch.contiguous_format)

    def alone(row: SharedRow, scores: torch.Tensor, own: torch.Tensor, count: int) -> torch.Tensor:
        return scores.new_zeros(len(scores), count).index_copy(1, own, scores)

    monkeypatch.setattr(SharedRow, "exchanged", unsent)
    monkeypatch.setattr(SharedRow, "joined", alone)
    config, case = small_config(), ("prefix_shared", every)
    estimated = estimated_bytes(config, settings(), *case, bf16=False, sharing=2)
    measured = measured_bytes(config, *case, bf16=False, place=Place(0, 2))
    assert estimated == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif("offload" not in checkpointing_options(), reason="older transformers")
@pytest.mark.parametrize("every", [1, 2, 3], ids=NAMES.get)
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_few_layers_stand_for_all_where_some_are_computed_again(every, offload):
    config = AutoConfig.for_model(**TINY | {"num_hidden_layers": 14})
    given = recipe(config, checkpointing=Checkpointing(every, offload))
    all_layers = simulation._run(given, BATCH, 14)
    assert simulate(given, BATCH) == all_layers
    fewer = simulation._run(recipe(config, checkpointing=Checkpointing(1, offload)), BATCH, 14)
    assert (fewer.kept < all_layers.kept) == (every > 1)


@pytest.mark.skipif("offload" not in checkpointing_options(), reason="older transformers")
def test_offloaded_inputs_are_in_the_hosts_memory():
    config = AutoConfig.for_model(**TINY)
    kept, offloaded = (
        simulate(recipe(config, checkpointing=Checkpointing(1, offload)), BATCH)
        for offload in (False, True)
    )
    inputs = config.num_hidden_layers * BATCH.tokens * config.hidden_size * 2
    assert inputs <= kept.kept - offloaded.kept < 1.5 * inputs


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_two_and_four_layers_stand_for_all(autocast):
    """With autocast over fp32 weights, the forward's copies of weights grow and the rest does not:
    each part has to be extrapolated by itself."""
    config = AutoConfig.for_model(**TINY)
    given = recipe(config, dtype=torch.float32, autocast=autocast)
    all_six = simulation._run(given, BATCH, 6)
    assert simulate(given, BATCH) == all_six
    assert all_six.peak >= all_six.kept


def test_checkpointing_and_a_shared_prompt_hold_less():
    config = AutoConfig.for_model(**TINY)
    lengths = PairLengths(np.array([500]), np.array([40]), np.array([60]))
    shared, padded = (micro_batch(lengths, PACKINGS[name]) for name in ("prefix_shared", "padded"))
    assert shared.tokens == 600
    assert padded.tokens == 1120
    whole = recipe(config, checkpointing=None)
    assert simulate(recipe(config), shared).kept < simulate(whole, shared).kept / 4
    assert simulate(whole, shared).kept < simulate(whole, padded).kept


@pytest.mark.parametrize("layout", ["packed", "prefix_shared"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_ranks_that_share_a_row_hold_a_part_of_it(device, layout):
    config = AutoConfig.for_model(**TINY)
    lengths = PairLengths(np.array([500]), np.array([44]), np.array([60]))
    row = micro_batch(lengths, Packing(layout, "varlen", ""))
    of_two = row.of_a_rank(2)
    assert (of_two.tokens, of_two.scored) == (row.tokens // 2, 52)
    attention = "sdpa" if device == "cpu" else "flash_attention_2"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    where = {"device": device, "attention": attention, "dtype": dtype, "checkpointing": None}
    alone, shared = (simulate(recipe(config, **where), batch) for batch in (row, of_two))
    assert alone.kept / 2 < shared.kept < 0.65 * alone.kept  # attention's lengths stay, and masks


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dense_masks_cost_their_area(attention):
    config = AutoConfig.for_model(**TINY)
    lengths = PairLengths(np.array([500]), np.array([40]), np.array([60]))
    fused = simulate(recipe(config, checkpointing=None), micro_batch(lengths, PACKINGS["padded"]))
    dense = simulate(
        recipe(config, checkpointing=None, attention=attention),
        micro_batch(lengths, PACKINGS["padded"]),
    )
    assert dense.kept > fused.kept + 2 * 560 * 560  # at least a byte for each entry of both masks


def test_an_adapter_needs_no_gradient_of_the_head():
    config = AutoConfig.for_model(**TINY | {"vocab_size": 50_000})
    full = simulate(recipe(config), BATCH)
    lora = simulate(recipe(config, settings={"use_peft": True}), BATCH)
    assert full.head - lora.head == pytest.approx(50_000 * 32 * 2, rel=0.05)


def test_a_model_that_cannot_run_without_data_is_an_error(monkeypatch):
    monkeypatch.setattr(simulation, "masks_for", lambda *_: torch.ones(3).item())
    with pytest.raises(UserError, match="llama: its memory is known only"):
        simulate(recipe(AutoConfig.for_model(**TINY)), BATCH)


SMALL = {k: v for k, v in TINY.items() if k != "model_type"} | {"num_hidden_layers": 2}
MIXTURE = SMALL | {"head_dim": 8, "num_experts_per_tok": 2}
FAMILIES = {
    "gemma3_text": SMALL | {"head_dim": 8},  # whose scale of embeddings is a tensor
    "qwen3_moe": MIXTURE | {"num_experts": 4, "moe_intermediate_size": 16},
    "gpt_oss": MIXTURE | {"num_local_experts": 4},
    "falcon_h1": SMALL
    | {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_that_are_not_like_llama(family):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    batch = micro_batch(PairLengths(*np.array([[5], [6], [3]])), PACKINGS["padded"])
    how: Any = {"dtype": torch.float32, "autocast": torch.bfloat16, "attention": "eager"}
    held = simulate(recipe(config, checkpointing=None, **how), batch)
    assert held.peak > held.kept > 0
