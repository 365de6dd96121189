"""Packed and prefix-shared rows: exactly what every sequence gives alone."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers.integrations.flash_attention as their_flash
import transformers.integrations.flex_attention as their_flex
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.packing import PairCollator, model_inputs

from tests.support.packed_rows import (
    FAMILIES,
    RELATIVES,
    alone,
    errors,
    expected,
    family_model,
    token_pairs,
)
from tests.support.tiny_models import tiny_model

BOUND = 5e-6
LEAK = 0.5

ATTENTION = [
    ("sdpa", "dense"),
    ("sdpa", "varlen"),
    ("eager", "dense"),
    ("flex_attention", "blocks"),
    ("flash_attention_2", "varlen"),
]
COMBINATIONS = [
    pytest.param(family, attention, rows, id=f"{family}-{attention}-{rows}")
    for family in FAMILIES
    for attention, rows in ATTENTION
    if not (family == "gemma2" and attention == "sdpa")  # which has no softcap
]
checkpointing_too = pytest.mark.parametrize(
    "checkpointing", [False, True], ids=["stored", "checkpointed"]
)
both_layouts = pytest.mark.parametrize("layout", ["packed", "prefix_shared"])


@pytest.fixture(autouse=True)
def kernels_that_run_on_a_cpu(monkeypatch):
    """flash-attn's varlen kernel by its definition, and flex attention's backward without C++."""
    monkeypatch.setattr(their_flash, "_flash_attention_forward", flash_by_definition)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(their_flex.WrappedFlexAttention, "__call__", lambda _: COMPILED_FLEX)
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda *args, _compile, **kwargs: create_block_mask(*args, **kwargs),
    )


COMPILED_FLEX = torch.compile(flex_attention, backend="aot_eager")
THEIR_FLASH_FORWARD = vars(their_flash)["_flash_attention_forward"]


def flash_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    softmax_scale: float,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool,
    **_: Any,
) -> Tensor:
    """[1, T, heads, D]: what flash_attn_varlen_func computes, sequences aligned at their ends."""
    assert mask is None
    assert is_causal
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    out = []
    spans = [list(pairwise(lens.tolist())) for lens in (cu_seq_lens_q, cu_seq_lens_k)]
    for longest, lens in zip((max_length_q, max_length_k), spans, strict=True):
        assert max(end - begin for begin, end in lens) == longest
    for (q0, q1), (k0, k1) in zip(*spans, strict=True):
        q, k, v = query[0, q0:q1], key[0, k0:k1], value[0, k0:k1]
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(k1 - k0)[None] - torch.arange(k1 - k0)[-(q1 - q0) :, None]
        seen = behind <= 0
        if sliding_window is not None:
            seen &= behind > -sliding_window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out)[None]


def test_flash_attention_takes_what_it_is_given():
    taken = inspect.signature(THEIR_FLASH_FORWARD).parameters
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        assert name in taken


@checkpointing_too
@both_layouts
@pytest.mark.parametrize(("family", "attention", "rows"), COMBINATIONS)
def test_exact(family, attention, rows, layout, checkpointing):
    batch = PairCollator(0, layout=layout, rows=rows, area_cost=0.05)(token_pairs())
    if rows == "dense":
        assert 1 < len(batch["input_ids"]) < (8 if layout == "packed" else 4)
    model = family_model(family, attention)
    logps, gradients = errors(model, batch, expected(family), checkpointing=checkpointing)
    assert logps <= BOUND
    assert gradients <= BOUND


@pytest.mark.parametrize(("attention", "rows"), ATTENTION[:2])
@pytest.mark.parametrize("family", RELATIVES)
def test_relatives_are_exact(family, attention, rows):
    batch = PairCollator(0, layout="prefix_shared", rows=rows)(token_pairs())
    logps, gradients = errors(family_model(family, attention), batch, expected(family))
    assert logps <= BOUND
    assert gradients <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(("layout", "leak"), [("prefix_shared", "branch"), ("packed", "segment")])
def test_a_leak_would_show(family, layout, leak):
    """Negative controls: rejected sees chosen; sequences see those before them."""
    batch = PairCollator(0, layout=layout, area_cost=1e-9)(token_pairs())
    assert len(batch["input_ids"]) == 1
    batch[f"{leak}_ids"].clamp_(max=1 if leak == "branch" else 0)
    logps, gradients = errors(family_model(family, "sdpa"), batch, expected(family))
    assert logps > LEAK
    assert gradients > LEAK


def test_a_leak_between_lengths_would_show():
    batch = PairCollator(0, layout="prefix_shared", rows="varlen")(token_pairs())
    batch["kv_index"] = batch["kv_index"].roll(1)
    assert errors(family_model("llama", "sdpa"), batch, expected("llama"))[0] > LEAK


@both_layouts
def test_windows_go_by_position(layout):
    """Rejected stands behind chosen, yet a window of 8 reaches from it into the prompt."""
    pairs = [{"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9] * 12, "rejected_ids": [10, 11, 12]}]
    model: Any = family_model("mistral", "sdpa")
    logps = alone(family_model("mistral"), pairs)
    patch_head(model)
    for rows in ("dense", "varlen"):
        batch = PairCollator(0, layout=layout, rows=rows, area_cost=1e-9)(pairs)
        assert (model(**model_inputs(batch)).token_logps - logps).abs().max() <= BOUND


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@both_layouts
def test_padding_changes_nothing(layout, family):
    pairs = token_pairs()
    model = family_model(family)
    patch_head(model, tail="exact")
    scored = []
    for token, rows, area_cost in ((0, "dense", 1e-9), (7, "blocks", 0), (9, "dense", 1.0)):
        collator = PairCollator(token, layout=layout, rows=rows, area_cost=area_cost)
        batch = collator(pairs)
        logps = model(**model_inputs(batch)).token_logps
        logps.sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in grads)
        scored.append(logps)
        assert (batch["segment_ids"] < 0).any() == (token > 0)
    assert len(batch["input_ids"]) > 1
    torch.testing.assert_close(scored[1], scored[0], rtol=0, atol=BOUND)
    torch.testing.assert_close(scored[2], scored[0], rtol=0, atol=BOUND)


def test_generation_and_padded_batches_are_untouched():
    model: Any = family_model("qwen2", "sdpa")
    prompt = torch.tensor([[0, 5, 6, 7]])
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    written = model.generate(prompt, **settings)
    logits = model(input_ids=prompt).logits
    patch_head(model)
    for rows in ("dense", "varlen"):
        batch = PairCollator(0, layout="prefix_shared", rows=rows)(token_pairs())
        model(**model_inputs(batch))
    assert torch.equal(model.generate(prompt, **settings), written)
    assert torch.equal(model(input_ids=prompt).logits, logits)


def test_logits_of_packed_rows_too():
    """Without targets a patched model gives logits, with the mask that packed rows need."""
    pairs = token_pairs(2)
    model: Any = family_model("qwen3", "sdpa")
    patch_head(model)
    batch = PairCollator(0, layout="prefix_shared", rows="varlen")(pairs)
    inputs = model_inputs(batch)
    scored = model(**inputs).token_logps
    del inputs["select"], inputs["targets"]
    logits = model(**inputs).logits.flatten(0, 1)[batch["select"]].log_softmax(-1)
    expected = logits.gather(1, batch["targets"][:, None])[:, 0]
    torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-5)


def test_what_it_refuses():
    batch = PairCollator(0, layout="prefix_shared")(token_pairs())
    inputs = model_inputs(batch)
    varlen = model_inputs(PairCollator(0, layout="packed", rows="varlen")(token_pairs()))
    eager, flash = family_model("llama"), family_model("llama", "flash_attention_2")
    stablelm = tiny_model("stablelm")
    stablelm.config._attn_implementation = "sdpa"
    for model in (eager, flash, stablelm):
        patch_head(model)
    with pytest.raises(UserError, match="position_ids"):
        eager(**{**inputs, "position_ids": None})
    with pytest.raises(UserError, match="attention_mask"):
        eager(**inputs, attention_mask=torch.ones_like(batch["input_ids"]))
    with pytest.raises(UserError, match="takes a mask"):
        eager(**varlen)
    with pytest.raises(UserError, match="varlen"):
        flash(**inputs)
    with pytest.raises(UserError, match="does not hand the lengths"):
        stablelm(**varlen)
    gemma = family_model("gemma2", "sdpa")
    patch_head(gemma)
    with pytest.raises(UserError, match="softcap"):
        gemma(**varlen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both_layouts
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
def test_torch_varlen_on_a_gpu(family, layout, monkeypatch):
    """bf16 against fp32 eager: no further off than padded rows are, gradients included."""
    pairs = token_pairs(seed=1)
    model: Any = family_model(family).cuda()
    patch_head(model, tail="exact")

    def scored(attention: str, dtype: torch.dtype, **layout: Any) -> tuple[Tensor, Tensor]:
        model.to(dtype).config._attn_implementation = attention
        model.zero_grad()
        batch = PairCollator(0, **layout)(pairs)
        inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch.items()}
        logps = model(**model_inputs(inputs)).token_logps
        logps.sum().backward()
        grads = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        return logps.detach(), torch.cat(grads)

    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    half = torch.bfloat16
    padded = scored("sdpa", half)
    packed = scored("sdpa", half, layout=layout, rows="varlen")
    model.float().load_state_dict(weights, strict=False)
    exact = scored("eager", torch.float32)
    for wrong, right, reference in zip(packed, padded, exact, strict=True):
        assert (wrong - reference).norm() <= 2 * (right - reference).norm() + 1e-3
