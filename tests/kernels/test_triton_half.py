"""The head's Triton kernels in bf16 and fp16: interpreted as a GPU rounds, native with CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob import triton_backward
from widemargin.kernels.linear_logprob.function import linear_logprob
from widemargin.kernels.linear_logprob.tiles import FULL, Tiles, tiles_for
from widemargin.kernels.linear_logprob.types import GradRequest

from tests.support.head_cases import VARIANTS, gradients, make, relative, split
from tests.support.triton_inputs import DEVICE, saved_forward


@pytest.fixture(autouse=True)
def _half_precision(monkeypatch):
    if DEVICE == "cpu":
        from tests.support.interpreted_half import take_half_precision

        take_half_precision(monkeypatch)


def half_inputs(n, h, v, dtype, **options):
    hidden, weight, targets, bias, grad = make(n, h, v, dtype, **options)
    leaves = [
        x if x is None else x.detach().to(DEVICE).requires_grad_() for x in (hidden, weight, bias)
    ]
    return leaves[0], leaves[1], targets.to(DEVICE), leaves[2], grad.to(DEVICE)


def in_fp64(hidden, weight, targets, bias):
    wide = [None if x is None else x.detach().double() for x in (hidden, weight, bias)]
    wide = [x if x is None else x.requires_grad_() for x in wide]
    return wide[0], wide[1], targets, wide[2]


@pytest.mark.costly
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_within_twice_torchs_error(variant, dtype):
    """Logps as exact as fp32 logits of the same inputs; gradients within twice torch's error."""
    bias, options = split(variant)
    *inputs, grad = half_inputs(130, 32, 700, dtype, bias=bias, sharp=0.7)
    expected, true = gradients(reference.linear_logprob, *in_fp64(*inputs), grad, **options)
    logps, grads = gradients(
        linear_logprob, *inputs, grad, backend="triton", tail="exact", **options
    )
    assert (logps - expected).abs().max() < 2e-5
    _, peers = gradients(reference.linear_logprob, *inputs, grad, **options)
    for got, right, peer in zip(grads, true, peers, strict=True):
        assert got.dtype == dtype
        assert relative(got, right) <= 2 * relative(peer, right) + 1e-6


@pytest.mark.costly
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_averaged_tail_agrees_with_fp32(variant, dtype):
    """Routing and tail in half precision make what they make of the same numbers in fp32."""
    bias, options = split(variant)
    *inputs, grad = half_inputs(130, 32, 700, dtype, bias=bias, sharp=1.5)
    settings = {"backend": "triton", "tail_eps": 2**-6, **options}
    logps, grads = gradients(linear_logprob, *inputs, grad, **settings)
    wide = [x if x is None or x.dtype == torch.int64 else x.detach().float() for x in inputs]
    wide = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in wide]
    expected, true = gradients(linear_logprob, *wide, grad, **settings)
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-5)
    for got, right in zip(grads, true, strict=True):
        assert relative(got, right) < {torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]


@pytest.mark.costly
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_by_descriptors(dtype):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors are used from sm_90 on")
    hidden, weight, targets, bias, grad = half_inputs(130, 32, 1100, dtype, bias=True, sharp=1.5)
    call, saved = saved_forward(hidden.detach(), weight.detach(), targets, bias)
    request = GradRequest(grad.float(), targets >= 0, 2**-6, True, True, True)
    tiles = FULL if DEVICE == "cpu" else tiles_for(dtype, hidden.device)
    described = Tiles(tiles.forward, *(tile._replace(descriptors=True) for tile in tiles[1:]))
    expected, _ = triton_backward.backward(call, saved, request, tiles)
    found, _ = triton_backward.backward(call, saved, request, described)
    for got, right in zip(found, expected, strict=True):
        assert relative(got, right) < {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


@pytest.mark.costly
def test_entropy_and_its_gradient():
    *inputs, _ = half_inputs(130, 32, 700, torch.bfloat16, sharp=0.7)
    hidden, weight, targets, _ = inputs
    settings = {"backend": "triton", "tail": "exact", "return_entropy": True}
    _, entropy = linear_logprob(hidden, weight, targets, **settings)
    wide, wide_weight, *_ = in_fp64(*inputs)
    expected = reference.token_facts(reference.head_logits(wide, wide_weight), targets).entropy
    torch.testing.assert_close(entropy.double(), expected, rtol=0, atol=2e-5)
    peer = reference.token_facts(reference.head_logits(hidden, weight), targets).entropy
    got, right, torchs = (
        torch.autograd.grad(x.sum(), leaves)
        for x, leaves in (
            (entropy, (hidden, weight)),
            (expected, (wide, wide_weight)),
            (peer, (hidden, weight)),
        )
    )
    for mine, true, theirs in zip(got, right, torchs, strict=True):
        assert relative(mine, true) <= 2 * relative(theirs, true) + 1e-6


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")
def test_the_interpreters_bf16_is_torchs():
    from tests.support.interpreted_half import rounded, widened

    values = np.array([1.0, 1.00390625, 1.01171875, -3.3e38, 1e-40, np.inf, np.nan], np.float32)
    bits = torch.from_numpy(values).bfloat16()
    torch.testing.assert_close(torch.from_numpy(widened(rounded(values))), bits.float(),
                               rtol=0, atol=0, equal_nan=True)  # fmt: skip
