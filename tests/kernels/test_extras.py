"""What the head says of each token's distribution on request, in torch and in Triton's kernels."""

from __future__ import annotations

import pytest
import torch
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob import extras
from widemargin.kernels.linear_logprob.function import linear_logprob

from tests.support.head_cases import make, relative
from tests.support.triton_inputs import DEVICE

ALL = {
    "return_entropy": True,
    "return_log_sum_sq_probs": True,
    "return_mean_logits": True,
    "return_is_top1": True,
}
VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.7, "logit_scale": -0.5}, id="temperature and scale"),
    pytest.param({"softcap": 3.0, "temperature": 1.3}, id="softcap and temperature"),
]
SHAPES = [(1, 16, 300), (7, 32, 1009), (5, 16, 77), (130, 8, 700)]


def case(backend, n, h, v, **options):
    """Inputs of which every second target is the most likely one."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    device = "cpu" if backend == "torch" else DEVICE
    hidden, weight, targets, bias, grad = make(n, h, v, dtype, bias=True)
    leaves = [x.detach().to(device).requires_grad_() for x in (hidden, weight, bias)]
    targets = targets.to(device)
    with torch.no_grad():
        targets[::2] = reference.head_logits(*leaves, **options).argmax(-1)[::2]
    return *leaves, targets, grad.to(device, dtype)


def in_fp64(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("n", "h", "v"), SHAPES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_facts_by_definition(backend, n, h, v, options):
    hidden, weight, bias, targets, _ = case(backend, n, h, v, **options)
    targets[1::3] = -100
    settings = {"bias": bias, "backend": backend, **options}
    logps, *facts = linear_logprob(hidden, weight, targets, **settings, **ALL)
    assert facts[3].any()
    logits = reference.head_logits(*in_fp64(hidden, weight, bias), **options)
    expected = reference.token_facts(logits, targets)
    tolerance = 1e-12 if backend == "torch" else 1e-5
    for got, right in zip(facts[:3], expected[:3], strict=True):
        torch.testing.assert_close(got.double(), right.detach(), rtol=tolerance, atol=tolerance)
    assert torch.equal(facts[3], expected.is_top1)
    alone = linear_logprob(hidden, weight, targets, **settings)
    torch.testing.assert_close(logps, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_entropys_gradient_with_the_exact_tail(backend, options):
    hidden, weight, bias, targets, grad = case(backend, 130, 16, 700, **options)
    targets[3] = -100
    settings = {"backend": backend, "tail": "exact", "return_entropy": True, **options}
    logps, entropy = linear_logprob(hidden, weight, targets, bias=bias, **settings)
    leaves = (hidden, weight, bias)
    wide = in_fp64(*leaves)
    logits = reference.head_logits(*wide, **options)
    right = reference.linear_logprob(wide[0], wide[1], targets, bias=wide[2], **options)
    right_entropy = reference.token_facts(logits, targets).entropy
    of_both = logps @ grad + entropy @ grad.flip(0), right @ grad.double()
    of_both = of_both[0], of_both[1] + right_entropy @ grad.flip(0).double()
    for loss, expected in (of_both, (entropy.sum(), right_entropy.sum())):
        got = torch.autograd.grad(loss, leaves, retain_graph=True)
        true = torch.autograd.grad(expected, wide, retain_graph=True)
        for mine, definition in zip(got, true, strict=True):
            assert relative(mine, definition) < (1e-11 if backend == "torch" else 5e-6)


@pytest.mark.parametrize("tail", ["mean", "drop"])
def test_entropys_gradient_is_refused_with_another_tail(tail):
    hidden, weight, targets, _, grad = make(6, 8, 300)
    logps, entropy = linear_logprob(hidden, weight, targets, tail=tail, return_entropy=True)
    logps.backward(grad, retain_graph=True)  # with the entropy for a log
    with pytest.raises(NotImplementedError, match=r"pass tail='exact'.*or detach it"):
        (logps + 0.1 * entropy).sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_first_of_equal_logits_is_the_greedy_one(backend):
    """Rows 5, 60 and 200 are one: the same block, and another one."""
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 8, generator=gen).to(DEVICE)
    weight /= weight.norm(dim=1, keepdim=True)
    weight[60] = weight[200] = weight[5]
    hidden = 4 * weight[[5, 5, 5, 7]]
    targets = torch.tensor([5, 60, 200, 7], device=DEVICE)
    _, is_top1 = linear_logprob(hidden, weight, targets, backend=backend, return_is_top1=True)
    assert is_top1.tolist() == [True, False, False, True]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_block_that_a_bias_masks(backend):
    hidden, weight, bias, targets, grad = case(backend, 9, 8, 500)
    targets %= 128
    with torch.no_grad():
        bias[128:300] = -torch.inf
    settings = {"bias": bias, "backend": backend, "tail": "exact"}
    logps, *facts = linear_logprob(hidden, weight, targets, **settings, **ALL)
    expected = reference.token_facts(reference.head_logits(hidden, weight, bias), targets)
    for got, right in zip(facts, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)
    for gradient in torch.autograd.grad((logps + facts[0]) @ grad, (hidden, weight, bias)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_bad_token_leaves_the_others_alone(backend):
    hidden, weight, bias, targets, _ = case(backend, 9, 8, 300)
    settings = {"bias": bias, "backend": backend}
    clean = linear_logprob(hidden, weight, targets, **settings, **ALL)
    with torch.no_grad():
        hidden[3, 0] = torch.nan
    poisoned = linear_logprob(hidden, weight, targets, **settings, **ALL)
    others = torch.arange(9) != 3
    for before, after in zip(clean, poisoned, strict=True):
        assert torch.equal(before[others], after[others])
        assert not (after[3].isfinite() if after.is_floating_point() else after[3])


def test_a_very_sure_token():
    """Its entropy keeps its digits, which ``lse - sum p z`` would lose at logits of 500."""
    weight = torch.eye(300)
    hidden = torch.full((1, 300), 480.0)
    hidden[0, 7] = 500.0
    settings = {"return_entropy": True, "return_log_sum_sq_probs": True}
    _, entropy, squares = linear_logprob(hidden, weight, torch.tensor([7]), **settings)
    expected = reference.token_facts(hidden.double(), torch.tensor([7]))
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=0, atol=4e-7)
    torch.testing.assert_close(squares.double(), expected.log_sum_sq_probs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_what_is_asked_for_comes_in_the_order_of_the_arguments(name):
    hidden, weight, targets, _, _ = make(6, 8, 300)
    every = linear_logprob(hidden, weight, targets, return_stats=True, **ALL)
    _, fact = linear_logprob(hidden, weight, targets, **{name: True})
    assert len(every) == 6
    assert torch.equal(fact, every[2 + list(ALL).index(name)])


def test_no_tokens():
    hidden, weight, targets, _, _ = make(0, 8, 300)
    facts = linear_logprob(hidden, weight, targets, tail="exact", **ALL)
    assert [fact.shape for fact in facts] == [(0,)] * 5
    facts[1].sum().backward()
    assert (weight.grad == 0).all()


def test_half_precision_is_as_exact_as_its_inputs():
    hidden, weight, targets, _, _ = make(40, 32, 900, torch.bfloat16)
    facts = linear_logprob(hidden, weight, targets, **ALL)[1:]
    wide = reference.head_logits(hidden.double(), weight.double())
    expected = reference.token_facts(wide, targets)
    for got, right in zip(facts[:3], expected[:3], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)


def test_compiles_as_one_graph():
    hidden, weight, targets, _, _ = make(12, 8, 700, torch.float32)

    def loss(hidden, weight):
        logps, *facts = linear_logprob(hidden * 1.5, weight, targets, tail="exact", **ALL)
        return (logps + facts[0] + facts[1] + facts[2]).sum(), facts[3]

    value, is_top1 = loss(hidden, weight)
    expected = torch.autograd.grad(value, (hidden, weight))
    value, compiled_top1 = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    assert torch.equal(compiled_top1, is_top1)
    torch.testing.assert_close(torch.autograd.grad(value, (hidden, weight)), expected)


def test_costs_nothing_when_not_asked_for(monkeypatch):
    monkeypatch.setattr(extras.BlockSums, "__init__", lambda *_: pytest.fail("was not asked for"))
    hidden, weight, targets, _, grad = make(6, 8, 300)
    logps, _ = linear_logprob(hidden, weight, targets, return_stats=True)
    logps.backward(grad)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), "warm"])
def test_a_temperature_is_above_0(temperature):
    hidden, weight, targets, _, _ = make(6, 8, 300)
    with pytest.raises(ValueError, match="temperature: expected a number above 0"):
        linear_logprob(hidden, weight, targets, temperature=temperature)
