"""Recurrent layers over packed rows: exactly what every sequence gives alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.packing import PairCollator, model_inputs
from widemargin.trainer.packing.choose import choose_packing
from widemargin.trainer.packing.recurrent import (
    TIMED,
    keep_sequences_apart,
    kernel_without_boundaries,
)
from widemargin.trainer.packing.verify import settle_packing

from tests.support import fake_kernels
from tests.support.packed_rows import RECURRENT, alone, errors, family_model, gradient, token_pairs
from tests.support.tiny_models import tiny_trainer

BOUND = 5e-6
UNKNOWN = "the installed transformers has no such family"
known = [
    pytest.param(family, marks=pytest.mark.skipif(name not in CONFIG_MAPPING, reason=UNKNOWN))
    for family, (name, _) in RECURRENT.items()
]


@pytest.mark.parametrize("family", known)
@pytest.mark.parametrize("layout", ["packed", "prefix_shared"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_rows_give_what_each_sequence_gives_alone(family, layout, checkpointing):
    model, rows = family_model(family, "sdpa").eval(), token_pairs(3)
    logps = alone(model, rows)
    expected = logps.detach(), gradient(model, logps)
    batch = PairCollator(0, layout=layout, rows="varlen")(rows)
    logp_error, gradient_error = errors(model, batch, expected, checkpointing=checkpointing)
    bound = (2 if family == "zamba2" else 1) * BOUND  # it has twice the layers
    assert logp_error < bound
    assert gradient_error < bound


@pytest.mark.parametrize("family", ["mamba", "falcon_h1", "lfm2", "qwen3_next"])
def test_one_answer_changes_no_other(family):
    """Bit for bit: nothing is carried from a sequence into the next."""
    model, rows = family_model(family, "sdpa").eval(), token_pairs(3)
    patch_head(model, tail="exact")
    changed = [dict(row) for row in rows]
    changed[1]["chosen_ids"] = [token + 1 for token in rows[1]["chosen_ids"]]
    first, second = (
        model(**model_inputs(PairCollator(0, layout="prefix_shared", rows="varlen")(part)))
        for part in (rows, changed)
    )
    bounds = PairCollator(0)(rows)["cu_seqlens"]
    same = torch.ones(len(first.token_logps), dtype=torch.bool)
    same[bounds[1] : bounds[2]] = False
    assert torch.equal(first.token_logps[same], second.token_logps[same])
    assert not torch.equal(first.token_logps[~same], second.token_logps[~same])


def test_generation_and_other_models_are_as_before():
    model, untouched = (family_model("qwen3_next", "sdpa").eval() for _ in range(2))
    tokens = torch.arange(3, 11)[None]
    before = untouched.generate(tokens, max_new_tokens=4, do_sample=False)
    patch_head(model)
    model(**model_inputs(PairCollator(0, layout="packed", rows="varlen")(token_pairs(2))))
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), before)
    assert torch.equal(untouched.generate(tokens, max_new_tokens=4, do_sample=False), before)


def test_a_function_is_wrapped_once():
    model = family_model("qwen3_next", "sdpa")
    keep_sequences_apart(model)
    module = sys.modules[type(model).__module__]
    wrapped = {name: vars(module).get(name) for name in TIMED}
    keep_sequences_apart(model)
    keep_sequences_apart(family_model("qwen3_next", "sdpa"))
    assert {name: vars(module).get(name) for name in TIMED} == wrapped


@pytest.mark.parametrize("family", ["mamba2", "qwen3_next"])
def test_auto_shares_prompts_and_trains_as_padded_rows_do(tmp_path, family):
    learnt: list[Any] = []
    for packing in ("auto", "padded"):
        model = family_model(family, "sdpa")
        trainer = tiny_trainer(tmp_path, model, packing=packing)
        assert trainer.pipeline.layout == ("padded" if packing == "padded" else "prefix_shared")
        trainer.train()
        learnt.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    fresh = torch.cat([p.detach().flatten() for p in family_model(family).parameters()])
    apart = (learnt[0] - learnt[1]).norm() / (learnt[1] - fresh).norm()
    assert apart < 1e-3


KERNELS = [p for p in known if p.values[0] not in ("mamba", "falcon_mamba", "jamba")]


def modeling(model: Any) -> Any:
    return sys.modules[type(model).__module__]


@pytest.mark.parametrize("family", KERNELS)
@pytest.mark.parametrize("layout", ["packed", "prefix_shared"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_a_package_s_kernel_is_given_the_boundaries(family, layout, checkpointing, monkeypatch):
    """No GPU here: a stand-in has the kernel's signature and restrictions, and torch's results."""
    model, rows = family_model(family, "sdpa").eval(), token_pairs(3)
    logps = alone(model, rows)
    expected = logps.detach(), gradient(model, logps)
    seen = fake_kernels.install(monkeypatch, modeling(model))
    batch = PairCollator(0, layout=layout, rows="varlen")(rows)
    assert max(errors(model, batch, expected, checkpointing=checkpointing)) < 2 * BOUND
    kernels = {fake_kernels.KERNELS[name][0] for name in TIMED if hasattr(modeling(model), name)}
    assert len({name for name, _ in seen}) == len(kernels)
    counts = batch["cu_seq_lens_k"].diff().tolist()
    assert all(given == counts for _, given in seen)  # one call, of all sequences


def test_kernels_that_are_layers_are_found(monkeypatch):
    """The package `kernels` makes a layer of each function, which it may replace later."""
    layers = pytest.importorskip("kernels")
    model = family_model("qwen3_next", "sdpa").eval()
    seen = fake_kernels.install(monkeypatch, modeling(model))
    for name in ("causal_conv1d_fn", "torch_chunk_gated_delta_rule"):
        made = getattr(modeling(model), name)
        if not isinstance(made, torch.nn.Module):  # as some releases of transformers have it
            made = layers.use_kernel_forward_from_hub(name)(made)
        assert isinstance(made, torch.nn.Module)
        monkeypatch.setattr(modeling(model), name, made)
    patch_head(model)
    model(**model_inputs(PairCollator(0, layout="packed", rows="varlen")(token_pairs(2))))
    assert {name for name, _ in seen} == {"causal_conv1d_fn", "chunk_gated_delta_rule"}


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba"])
def test_a_scan_without_boundaries_stays_padded(family, monkeypatch):
    model = family_model(family, "sdpa")
    assert kernel_without_boundaries(model.config) is None
    fake_kernels.install(monkeypatch, modeling(model))
    kernel = "mamba_ssm.ops.selective_scan_interface.selective_scan_fn"
    assert kernel_without_boundaries(model.config) == kernel
    packing = choose_packing("auto", model.config, attention="sdpa")
    assert (packing.layout, kernel in packing.reason) == ("padded", True)
    with pytest.raises(UserError, match="selective_scan_fn cannot keep sequences of a row apart"):
        choose_packing("packed", model.config, attention="sdpa")


def test_an_old_kernel_without_boundaries_is_not_given_packed_rows(monkeypatch):
    model = family_model("lfm2", "sdpa")
    old = {"causal_conv1d_fn": fake_kernels.no_boundaries}
    fake_kernels.install(monkeypatch, modeling(model), **old)
    patch_head(model)
    packing = settle_packing("auto", model, attention="sdpa")
    assert packing.layout == "padded"
    assert "causal_conv1d.causal_conv1d_fn cannot keep sequences" in packing.reason
