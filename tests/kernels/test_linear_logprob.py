"""The head: torch backend against the reference, in value and gradient, and its tails."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob import torch_backward, torch_forward
from widemargin.kernels.linear_logprob.function import linear_logprob
from widemargin.kernels.linear_logprob.types import GradRequest, HeadCall

from bench.lib.exact import exact
from bench.lib.peaked import peaked_case
from tests.support.head_cases import (
    VARIANTS,
    gradients,
    make,
    relative,
    split,
    tail_gradients,
)

SHAPES = [
    pytest.param(1, 16, 300, id="one token"),
    pytest.param(7, 32, 1009, id="prime vocabulary"),
    pytest.param(5, 16, 77, id="vocabulary below a block"),
    pytest.param(40, 24, 128, id="exactly one block"),
    pytest.param(1030, 8, 1153, id="more tokens and rows than a chunk"),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "h", "v"), SHAPES)
def test_exact_equals_reference_in_fp64(n, h, v, variant):
    bias, options = split(variant)
    *inputs, grad = make(n, h, v, bias=bias)
    inputs[2][::3] = -100
    logps, grads = gradients(linear_logprob, *inputs, grad, tail="exact", **options)
    expected, expected_grads = gradients(reference.linear_logprob, *inputs, grad, **options)
    torch.testing.assert_close(logps, expected, rtol=1e-11, atol=1e-11)
    for got, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, expected_grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant):
    bias, options = split(variant)
    hidden, weight, targets, offset, _ = make(3, 4, 140, bias=bias)
    targets[1] = -100

    def logps(hidden, weight, *rest):
        return linear_logprob(
            hidden, weight, targets, bias=rest[0] if rest else None, tail="exact", **options
        )

    leaves = (hidden, weight) if offset is None else (hidden, weight, offset)
    assert torch.autograd.gradcheck(logps, leaves)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tail", ["mean", "drop"])
def test_small_tail_eps_approaches_exact(tail, variant):
    """As eps falls, the error falls with the mass that is left to the tail."""
    bias, options = split(variant)
    *inputs, grad = make(50, 16, 1500, bias=bias, sharp=1.5)
    _, expected = gradients(reference.linear_logprob, *inputs, grad, **options)
    errors = []
    for eps in (0.5, 2**-4, 2**-16):
        _, grads = gradients(linear_logprob, *inputs, grad, tail=tail, tail_eps=eps, **options)
        errors.append(max(relative(g, e) for g, e in zip(grads, expected, strict=True)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tail", ["mean", "drop"])
def test_tails_by_definition(tail, variant):
    bias, options = split(variant)
    *inputs, grad = make(30, 12, 700, bias=bias, sharp=1.5)
    eps = 2**-3
    _, grads = gradients(linear_logprob, *inputs, grad, tail=tail, tail_eps=eps, **options)
    case = tail_gradients(*inputs, grad, tail, eps, **options)
    assert 0.02 < case.active < 0.9
    for got, expected in zip(grads, case.gradients, strict=False):
        assert relative(got, expected) < 2**-16  # of a share's low bits


def table_case(logits):
    """hidden, weight, no bias and gradients that make these logits [N, V]."""
    tokens = len(logits)
    hidden, weight = torch.eye(tokens, dtype=torch.float64), logits.T.contiguous()
    return hidden.requires_grad_(), weight.requires_grad_(), torch.linspace(-1, 2, tokens).double()


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": 0.5}])
@pytest.mark.parametrize("tail", ["mean", "drop"])
@pytest.mark.parametrize(
    ("tokens", "height", "eps", "tops"),
    [
        pytest.param(20, 0.0, 2**-1, "none", id="flat, no tops"),
        pytest.param(20, 12.0, 2**-4, "all", id="a top in every block"),
        pytest.param(1, 12.0, 2**-4, "all", id="one token"),
        pytest.param(20, 12.0, 2**-9, "dense", id="tops of blocks that are computed"),
    ],
)
def test_tops_by_definition(tokens, height, eps, tops, tail, options):
    """Logits from a table: in each of six blocks of 700 rows one column stands out."""
    gen = torch.Generator().manual_seed(0)
    logits = 0.1 * torch.randn(tokens, 700, generator=gen, dtype=torch.float64) - height
    places = torch.arange(0, 700, 128) + torch.randint(60, (tokens, 6), generator=gen)
    logits.scatter_(1, places, height)
    hidden, weight, grad = table_case(logits)
    targets = places[:, 0].clone()  # its block's largest element too
    targets[::3] += 1
    grad = grad.sign()
    _, grads = gradients(
        linear_logprob, hidden, weight, targets, None, grad, tail=tail, tail_eps=eps, **options
    )
    case = tail_gradients(hidden, weight, targets, None, grad, tail, eps, **options)
    if tops != "dense":
        others = {"none": 0, "all": 5 * tokens + len(targets[::3])}[tops]
        assert (case.active, case.tops) == (0.0, others)
    for got, expected in zip(grads, case.gradients, strict=False):
        assert relative(got, expected) < 2**-15


def test_tied_maxima():
    """One of equal largest elements is on its own, the others are averaged."""
    logits = torch.full((8, 300), -8.0, dtype=torch.float64)
    logits[:, [5, 9, 140, 141, 142]] = 2.0
    hidden, weight, grad = table_case(logits)
    targets = torch.tensor([5, 9, 0, 140, 142, 200, 141, 299])
    _, grads = gradients(linear_logprob, hidden, weight, targets, None, grad.sign(), tail_eps=0.45)
    case = tail_gradients(hidden, weight, targets, None, grad.sign(), "mean", 0.45)
    assert 0 < case.tops < 24
    for got, expected in zip(grads, case.gradients, strict=False):
        assert relative(got, expected) < 2**-15


def test_tops_save_pairs_and_error():
    """Against a routing without tops: fewer pairs, a better dW, and a dH about as good."""
    case = peaked_case(300, 64, 8192, entropy=1.5)
    call = HeadCall(case.hidden, case.weight, None, 1.0, None, torch.float32)
    saved = torch_forward.forward(call, case.targets, keep=True, profile=True, tops=True)
    scored = torch.ones(300, dtype=torch.bool)
    request = GradRequest(case.coefficients, scored, 2**-10, hidden=True, weight=True, bias=False)
    true = exact(case)
    answers = []
    for kept in (saved, saved._replace(tops=saved.tops[:0])):
        found, stats = torch_backward.backward(call, kept, request)
        errors = relative(found.hidden, true.dhidden), relative(found.weight, true.dweight)
        answers.append([stats[0].item(), *errors])
    (pairs, d_hidden, d_weight), without = answers
    assert pairs < 0.9 * without[0]
    assert d_hidden < 1.15 * without[1]
    assert d_weight < 0.9 * without[2]


def test_same_bits_every_time():
    *inputs, grad = make(200, 16, 3000, torch.float32, sharp=2.0)
    first, again = (gradients(linear_logprob, *inputs, grad, tail_eps=2**-8) for _ in range(2))
    for a, b in zip(first[1], again[1], strict=True):
        assert torch.equal(a, b)


def test_tail_keeps_the_gradient_balanced():
    """Over the vocabulary each token's gradient sums to zero, as the full softmax's does."""
    hidden, weight, targets, bias, _ = make(40, 16, 1000, bias=True, sharp=2.0)
    for tail, balanced in (("mean", True), ("drop", False)):
        grad = torch.ones(40, dtype=torch.float64)
        _, (_, _, d_bias) = gradients(
            linear_logprob, hidden, weight, targets, bias, grad, tail=tail, tail_eps=2**-4
        )
        assert (abs(d_bias.sum().item()) < 1e-9) is balanced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision_within_twice_torch(dtype, variant):
    """Logps as exact as fp32 logits of the same inputs; gradients within twice torch's error."""
    bias, options = split(variant)
    *inputs, grad = make(60, 32, 900, dtype, bias=bias, sharp=0.7)
    wide = [x if x is None or x.dtype == torch.int64 else x.detach().double() for x in inputs]
    for i in (0, 1, 3):
        if wide[i] is not None:
            wide[i].requires_grad_()
    expected, expected_grads = gradients(reference.linear_logprob, *wide, grad, **options)
    logps, grads = gradients(linear_logprob, *inputs, grad, tail="exact", **options)
    assert logps.dtype == torch.float32
    assert (logps - expected).abs().max() < 2e-5
    _, torch_grads = gradients(reference.linear_logprob, *inputs, grad, **options)
    for got, expected_grad, peer in zip(grads, expected_grads, torch_grads, strict=True):
        assert got.dtype == dtype
        assert relative(got, expected_grad) <= 2 * relative(peer, expected_grad) + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 30), v=st.integers(1, 400), shift=st.floats(-50, 50), seed=st.integers(0, 99)
)
def test_shifting_all_logits_changes_nothing(n, v, shift, seed):
    hidden, weight, targets, _, grad = make(n, 6, v, seed=seed)
    bias = torch.zeros(v, dtype=torch.float64)
    base, base_grads = gradients(linear_logprob, hidden, weight, targets, bias, grad)
    moved, moved_grads = gradients(linear_logprob, hidden, weight, targets, bias + shift, grad)
    torch.testing.assert_close(moved, base, rtol=1e-9, atol=1e-9)
    for a, b in zip(moved_grads, base_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 9), seed=st.integers(0, 99))
def test_chunking_changes_nothing(rows, blocks, seed):
    *inputs, grad = make(41, 8, 1200, seed=seed, sharp=1.5)
    uncut = gradients(linear_logprob, *inputs, grad, tail_eps=2**-6)
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch_forward, torch_backward):
            patch.setattr(module, "ROWS", rows)
            patch.setattr(module, "COLUMNS", 128 * blocks)
        cut = gradients(linear_logprob, *inputs, grad, tail_eps=2**-6)
    torch.testing.assert_close(cut, uncut, rtol=1e-9, atol=1e-11)


def test_vanished_gradients_cost_nothing():
    hidden, weight, targets, _, _ = make(64, 8, 2000, torch.float32)
    grad = torch.zeros(64)
    grad[:4] = 1.0
    logps, stats = linear_logprob(hidden, weight, targets, return_stats=True, tail_eps=2**-6)
    assert torch.isnan(stats.active_fraction)
    logps.backward(grad)
    assert 0 < stats.active_fraction <= 4 / 64
    assert 0 < stats.averaged_mass_mean <= stats.averaged_mass_max < 1 + 1e-5
    assert stats.dense == 0
