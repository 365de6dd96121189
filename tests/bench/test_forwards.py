"""Other ways to the logits in the head's forward: as the package's own, and differentiable."""

from __future__ import annotations

import pytest
import torch
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob.tiles import Tile
from widemargin.kernels.linear_logprob.triton_forward import forward_by

from bench.head.forwards import library, tma
from bench.head.forwards.head import scored_by
from tests.support.head_cases import VARIANTS, gradients, relative, split
from tests.support.triton_inputs import inputs_of, saved_forward

SHAPES = [
    pytest.param(1, 16, 300, id="one token"),
    pytest.param(7, 33, 1009, id="prime sizes"),
    pytest.param(5, 16, 77, id="vocabulary below a block"),
    pytest.param(129, 24, 128, id="exactly one block, one token past a tile"),
    pytest.param(300, 40, 650, id="three tiles"),
]


FORWARDS = {
    "tma": (tma.launch, Tile(128, 128, 16, 8, 2, together=2)),
    "library": (library.launch, Tile(128, 128, 256, 8, 2, together=2)),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "h", "v"), SHAPES)
def test_other_ways_to_the_product(n, h, v, variant, name):
    """Descriptors want rows of whole 16 bytes; where they cannot be had, pointers step in."""
    bias, options = split(variant)
    hidden, weight, targets, offset, _ = inputs_of(n, h, v, bias=bias)
    call, expected = saved_forward(hidden.detach(), weight.detach(), targets, offset, **options)
    with torch.no_grad():
        saved = forward_by(*FORWARDS[name], call, targets, keep=True, profile=True, tops=True)
    torch.testing.assert_close(saved, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORWARDS)
def test_a_head_of_one_is_differentiable(name):
    hidden, weight, targets, _, grad = inputs_of(300, 16, 1100, sharp=2.0)
    logps, stats = scored_by(*FORWARDS[name], hidden, weight, targets)
    found = torch.autograd.grad(logps, (hidden, weight), grad.float())
    expected, expected_grads = gradients(
        reference.linear_logprob, hidden, weight, targets, None, grad
    )
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
    for got, exact in zip(found, expected_grads, strict=True):
        assert relative(got, exact) < 1e-2
    assert 0 < stats.active_fraction <= 1
