"""The torch and the Triton head against each other, where they are to do the same."""

from __future__ import annotations

import pytest
import torch
from widemargin.kernels.linear_logprob import torch_forward
from widemargin.kernels.linear_logprob.function import linear_logprob
from widemargin.kernels.linear_logprob.routing import top_columns, top_shares

from tests.support.head_cases import gradients, relative
from tests.support.triton_inputs import DEVICE, inputs_of, saved_forward


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=str)
def test_forward_keeps_the_same(options):
    hidden, weight, targets, bias, _ = inputs_of(130, 16, 700, bias=True)
    call, by_triton = saved_forward(hidden, weight, targets, bias, **options)
    with torch.no_grad():
        by_torch = torch_forward.forward(call, targets, keep=True, profile=True, tops=True)
    for name in ("logps", "lse", "partial_lse", "profile"):
        mine, theirs = getattr(by_triton, name), getattr(by_torch, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(top_columns(by_triton.tops), top_columns(by_torch.tops))
    shares = top_shares(by_triton.tops), top_shares(by_torch.tops)
    torch.testing.assert_close(*shares, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tail", ["mean", "drop"])
@pytest.mark.parametrize("options", [{}, {"softcap": 15.0, "logit_scale": 1.5}], ids=str)
def test_gradients_of_tops_and_tail(options, tail):
    """In each of six blocks one column stands out, so no pair and no cell is active."""
    tokens, gen = 140, torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(tokens, 700, generator=gen) - 6
    places = torch.arange(0, 700, 128) + torch.randint(60, (tokens, 6), generator=gen)
    logits.scatter_(1, places, 6.0)
    targets = places[:, 0].clone()
    targets[::3] += 1
    hidden, weight = torch.eye(tokens), logits.T.contiguous()
    inputs = [x.to(DEVICE).requires_grad_() for x in (hidden, weight)]
    grad = torch.randn(tokens, generator=gen).sign().to(DEVICE)
    settings = {"tail": tail, "tail_eps": 2**-4, **options}
    found = []
    for backend in ("torch", "triton"):
        logps, stats = linear_logprob(
            *inputs, targets.to(DEVICE), backend=backend, return_stats=True, **settings
        )
        found.append(torch.autograd.grad(logps, inputs, grad))
        assert stats.active_fraction == 0
    for mine, theirs in zip(*found, strict=True):
        assert relative(mine, theirs) < 2**-15  # of a share's low bits


def test_gradients_with_the_exact_tail():
    *inputs, grad = inputs_of(130, 16, 700, bias=True)
    found = [
        gradients(linear_logprob, *inputs, grad, tail="exact", backend=backend, softcap=4.0)
        for backend in ("torch", "triton")
    ]
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        assert relative(mine, theirs) < 2e-6
