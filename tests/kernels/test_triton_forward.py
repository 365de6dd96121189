"""What the head's Triton forward keeps, by definition in fp64: interpreted, or native with CUDA."""

from __future__ import annotations

import pytest
import torch
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob.function import linear_logprob
from widemargin.kernels.linear_logprob.routing import top_columns, top_shares

from tests.support.triton_inputs import DEVICE, inputs_of, saved_forward

OPTIONS = [{}, {"softcap": 3.0}, {"logit_scale": -0.5}, {"logit_scale": 0.0}]


def logits_of(hidden, weight, bias, options):
    wide = [x if x is None else x.detach().double() for x in (hidden, weight, bias)]
    return reference.head_logits(*wide, options.get("logit_scale", 1.0), options.get("softcap"))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("n", "v"), [(1, 77), (130, 700), (9, 257)])
def test_statistics_by_definition(n, v, options):
    hidden, weight, targets, bias, _ = inputs_of(n, 16, v, bias=True)
    _, saved = saved_forward(hidden, weight, targets, bias, **options)
    z = logits_of(hidden, weight, bias, options)
    shares, columns = top_shares(saved.tops), top_columns(saved.tops)
    for b, block in enumerate(z.split(128, dim=1)):
        partial = block.logsumexp(1)
        torch.testing.assert_close(saved.partial_lse[b].double(), partial, rtol=0, atol=2e-5)
        shown = block.gather(1, columns[b][:, None])[:, 0]
        torch.testing.assert_close(shown, block.amax(1), rtol=0, atol=2e-5)
        torch.testing.assert_close(
            shares[b].double(), (block.amax(1) - partial).exp(), rtol=5e-5, atol=0
        )


def test_a_quarter_of_many_tokens_makes_the_profile():
    """Token tiles 0, 4 and 8 of 1,030 tokens: the last one holds six."""
    hidden, weight, targets, _, _ = inputs_of(1030, 8, 300)
    _, saved = saved_forward(hidden, weight, targets)
    sampled = torch.arange(1030, device=DEVICE) // 128 % 4 == 0
    z = logits_of(hidden, weight, None, {})[sampled]
    inside = torch.cat([block.softmax(1).mean(0) for block in z.split(128, dim=1)])
    torch.testing.assert_close(saved.profile.double(), inside, rtol=1e-4, atol=1e-7)


def test_a_block_without_probability_has_no_top():
    hidden, weight, targets, bias, grad = inputs_of(5, 8, 300, bias=True)
    targets.clamp_(max=100)
    with torch.no_grad():
        bias[128:256] = -torch.inf
    logps = linear_logprob(hidden, weight, targets, bias=bias, backend="triton")
    d_hidden, d_weight = torch.autograd.grad(logps, (hidden, weight), grad.float())
    assert torch.isfinite(d_hidden).all()
    assert (d_weight[128:256] == 0).all()


@pytest.mark.parametrize("wrong", [-7, 300, 383, 384, 2**40])
def test_a_target_outside_the_vocabulary_is_nan(wrong):
    """On a GPU nothing checks the ids, since that would wait for it."""
    hidden, weight, targets, _, _ = inputs_of(5, 8, 300)
    targets[2] = wrong
    _, saved = saved_forward(hidden, weight, targets)
    assert torch.isnan(saved.logps).tolist() == [False, False, True, False, False]
