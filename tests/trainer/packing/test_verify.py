"""The comparison with each sequence alone that decides for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.packing import verify
from widemargin.trainer.packing.choose import Packing, packings
from widemargin.trainer.packing.verify import compare_with_alone, settle_packing

from tests.support.packed_rows import family_model
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_exact_ones_pass_the_comparison(family):
    model = family_model(family, "eager" if family == "gemma2" else "sdpa")
    patch_head(model)
    for packing in packings("auto", model.config):
        if packing.layout != "padded":
            assert compare_with_alone(model, packing) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leak", ["branch_ids", "segment_ids"])
def test_a_leak_fails_the_comparison(leak, dtype, monkeypatch):
    model = family_model("llama").to(dtype)
    patch_head(model)
    right = Packing("prefix_shared", "dense", "")
    assert compare_with_alone(model, right) is None
    model_inputs = verify.model_inputs

    def leaking(batch: Any) -> dict[str, Any]:
        if leak in batch:
            batch[leak].clamp_(max=1 if leak == "branch_ids" else 0)
        return model_inputs(batch)

    monkeypatch.setattr(verify, "model_inputs", leaking)
    failure = compare_with_alone(model, Packing("prefix_shared", "dense", "", area_cost=1e-9))
    assert failure is not None
    assert "differ" in failure


def test_a_family_that_takes_no_lengths_gets_masks():
    """stablelm's attention never hears of them; a dense mask is exact."""
    model = tiny_model("stablelm")
    model.config._attn_implementation = "sdpa"
    patch_head(model)
    packing = settle_packing("auto", model)
    assert (packing.layout, packing.rows) == ("prefix_shared", "dense")


def test_families_with_positions_of_their_own_get_what_is_exact():
    """bloom takes no masks; mpt counts distances in the row, so that sequences may stand in it but
    rejected not behind chosen."""
    bloom = tiny_model("bloom", n_layer=2, n_head=4)
    mpt = tiny_model("mpt", d_model=32, n_heads=4, n_layers=2)
    for model, layout in ((bloom, "padded"), (mpt, "packed")):
        patch_head(model)
        assert settle_packing("auto", model).layout == layout
        with pytest.raises(UserError, match="does not work with this model"):
            settle_packing("prefix_shared", model)


def test_split_weights_are_not_compared(caplog):
    model: Any = tiny_model("stablelm")
    patch_head(model)
    assert settle_packing("auto", model, sharded=True).layout == "padded"
    packing = settle_packing("packed", model, sharded=True)
    assert packing.layout == "packed"
    assert "not tested" in caplog.text
    assert settle_packing("auto", tiny_model(), sharded=True).layout == "prefix_shared"


def test_padded_batches_are_compared_too():
    """CPM-Ant takes padding on the left only, and nothing else is to be had for it."""
    model = tiny_model("cpmant", dim_head=8, dim_ff=48, position_bias_num_buckets=32)
    patch_head(model)
    for setting in ("auto", "padded"):
        with pytest.raises(UserError, match="cannot be trained on several sequences at once"):
            settle_packing(setting, model)


def test_a_parameter_that_only_one_layout_reaches_counts():
    """Its gradient is zero in the other, which is a difference and not another length."""
    model: Any = tiny_model()
    layer = model.model.layers[0]
    layer.extra = torch.nn.Parameter(torch.ones(()))
    layer.register_forward_hook(
        lambda module, args, out: out * module.extra**100 if out.shape[1] <= 20 else out
    )
    patch_head(model)
    packing = settle_packing("auto", model)
    assert packing.layout == "padded"
    assert "gradients differ" in packing.reason
