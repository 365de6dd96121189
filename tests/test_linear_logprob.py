"""The head: torch backend against the reference, in value, gradient, memory and robustness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob import linear_logprob

SHAPES = [
    pytest.param(1, 16, 300, id="one token"),
    pytest.param(7, 32, 1009, id="prime vocabulary"),
    pytest.param(5, 16, 77, id="vocabulary below a block"),
    pytest.param(40, 24, 128, id="exactly one block"),
    pytest.param(1030, 8, 1153, id="more tokens and rows than a chunk"),
]
VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": True}, id="bias"),
    pytest.param({"logit_scale": 0.25, "bias": True}, id="scale and bias"),
    pytest.param({"softcap": 3.0}, id="softcap"),
    pytest.param({"softcap": 2.0, "logit_scale": 1.7, "bias": True}, id="all"),
]


def make(n: int, h: int, v: int, dtype=torch.float64, bias=False, sharp=1.0, seed=0):
    """hidden, weight, targets, bias and a gradient for the log-probs."""
    gen = torch.Generator().manual_seed(seed)
    hidden = (sharp * torch.randn(n, h, generator=gen, dtype=torch.float64)).to(dtype)
    weight = torch.randn(v, h, generator=gen, dtype=torch.float64).to(dtype)
    targets = torch.randint(v, (n,), generator=gen)
    offset = torch.randn(v, generator=gen, dtype=torch.float64).to(dtype) if bias else None
    grad = torch.randn(n, generator=gen, dtype=torch.float64)
    leaves = [x if x is None else x.requires_grad_() for x in (hidden, weight, offset)]
    return leaves[0], leaves[1], targets, leaves[2], grad


def split(variant: dict) -> tuple[bool, dict]:
    return bool(variant.get("bias")), {k: v for k, v in variant.items() if k != "bias"}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(op, hidden, weight, targets, bias, grad, **kwargs):
    logps = op(hidden, weight, targets, bias=bias, **kwargs)
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return logps.detach(), torch.autograd.grad(logps, leaves, grad.to(logps.dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "h", "v"), SHAPES)
def test_exact_equals_reference_in_fp64(n, h, v, variant):
    bias, options = split(variant)
    *inputs, grad = make(n, h, v, bias=bias)
    inputs[2][::3] = -100
    logps, grads = gradients(linear_logprob, *inputs, grad, tail="exact", **options)
    expected, expected_grads = gradients(reference.linear_logprob, *inputs, grad, **options)
    torch.testing.assert_close(logps, expected, rtol=1e-11, atol=1e-11)
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


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
def test_mean_tail_by_definition(variant):
    """Every inactive pair spreads its exact mass by the block's average distribution."""
    bias, options = split(variant)
    hidden, weight, targets, offset, grad = make(30, 12, 700, bias=bias, sharp=1.5)
    eps = 2**-3
    _, grads = gradients(
        linear_logprob, hidden, weight, targets, offset, grad, tail="mean", tail_eps=eps, **options
    )
    with torch.no_grad():
        scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
        z = reference.head_logits(hidden, weight, offset, scale, cap)
        slope = 1 - (z / cap) ** 2 if cap else torch.ones_like(z)
        p = z.softmax(-1)
        d_logits = torch.zeros_like(z)
        rows = torch.arange(30)
        inside = torch.zeros(6, 30)
        for b in range(6):
            block = slice(128 * b, min(128 * b + 128, 700))
            mass = p[:, block].sum(-1)
            profile = (p[:, block] / mass[:, None] * slope[:, block]).mean(0)
            rest = torch.where(targets // 128 == b, mass - p[rows, targets], mass)
            active = rest * grad.abs() >= eps * grad.abs().mean()
            active |= active.sum() > 0.75 * 30
            inside[b] = active
            own = -p[:, block] * slope[:, block]
            held = (targets // 128 == b) & active
            own[held, targets[held] - 128 * b] = 0
            spread = -rest[:, None] * profile
            d_logits[:, block] = torch.where(active[:, None], own, spread)
        assert 0.02 < inside.mean() < 0.9
        d_logits[rows, targets] += (1 - p[rows, targets]) * slope[rows, targets]
        d_logits *= grad[:, None] * scale
        expected = [d_logits @ weight, d_logits.T @ hidden, d_logits.sum(0)]
    for got, wanted in zip(grads, expected, strict=False):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


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
    for got, wanted, peer in zip(grads, expected_grads, torch_grads, strict=True):
        assert got.dtype == dtype
        assert relative(got, wanted) <= 2 * relative(peer, wanted) + 1e-6


@pytest.mark.parametrize("tail", ["exact", "mean", "drop"])
def test_frozen_inputs_get_no_gradient(tail):
    hidden, weight, targets, bias, grad = make(20, 8, 400, bias=True)
    assert bias is not None
    full = dict(
        zip(
            "hwb",
            gradients(linear_logprob, hidden, weight, targets, bias, grad, tail=tail)[1],
            strict=True,
        )
    )
    for kept in ("h", "w", "b", "hb"):
        leaves = {"h": hidden, "w": weight, "b": bias}
        leaves = {k: x.detach().requires_grad_(k in kept) for k, x in leaves.items()}
        out = linear_logprob(leaves["h"], leaves["w"], targets, bias=leaves["b"], tail=tail)
        out.backward(grad)
        for key, leaf in leaves.items():
            if key in kept:
                torch.testing.assert_close(leaf.grad, full[key])
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("tail", ["exact", "mean", "drop"])
def test_no_tokens(tail):
    hidden, weight, targets, bias, grad = make(0, 8, 300, bias=True)
    logps, grads = gradients(linear_logprob, hidden, weight, targets, bias, grad, tail=tail)
    assert logps.shape == (0,)
    assert [g.shape for g in grads] == [(0, 8), (300, 8), (300,)]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("tail", ["exact", "mean", "drop"])
def test_all_ignored(tail):
    hidden, weight, targets, _, grad = make(6, 8, 300)
    targets.fill_(-100)
    logps, grads = gradients(linear_logprob, hidden, weight, targets, None, grad, tail=tail)
    assert (logps == 0).all()
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("tail", ["exact", "mean", "drop"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_token_leaves_the_others_alone(tail, bad):
    hidden, weight, targets, _, grad = make(20, 8, 600, torch.float32, sharp=2.0)
    poisoned = hidden.detach().clone()
    poisoned[3, 0] = bad
    poisoned.requires_grad_()
    logps, (d_hidden, _) = gradients(
        linear_logprob, poisoned, weight, targets, None, grad, tail=tail
    )
    others = torch.arange(20) != 3
    assert not torch.isfinite(logps[3])
    assert torch.isfinite(d_hidden[others]).all()
    clean, (clean_d_hidden, _) = gradients(
        linear_logprob, hidden, weight, targets, None, grad, tail=tail
    )
    assert torch.equal(logps[others], clean[others])
    tolerance = 1e-6 if tail != "mean" else 2e-3  # the profile averages one token fewer
    torch.testing.assert_close(d_hidden[others], clean_d_hidden[others], rtol=0, atol=tolerance)


def test_columns_masked_by_bias():
    """A bias of -inf removes a token from the vocabulary, whole blocks included."""
    hidden, weight, targets, bias, grad = make(10, 8, 500, bias=True)
    bias = bias.detach().clone()
    bias[128:300] = -torch.inf
    targets = targets % 128
    for tail in ("exact", "mean", "drop"):
        logps, grads = gradients(linear_logprob, hidden, weight, targets, bias, grad, tail=tail)
        expected = reference.linear_logprob(hidden, weight, targets, bias=bias)
        torch.testing.assert_close(logps, expected.detach())
        assert all(torch.isfinite(g).all() for g in grads)


def test_memory_never_reads_uninitialised(monkeypatch):
    """Fresh memory is poisoned with NaN: nothing of it may reach a result."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    for tail in ("exact", "mean", "drop"):
        *inputs, grad = make(33, 8, 1100, torch.bfloat16, bias=True)
        logps, grads = gradients(linear_logprob, *inputs, grad, tail=tail, softcap=4.0)
        assert torch.isfinite(logps).all()
        assert all(torch.isfinite(g).all() for g in grads)


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
    from widemargin.kernels import torch_head, torch_head_backward

    *inputs, grad = make(41, 8, 1200, seed=seed, sharp=1.5)
    whole = gradients(linear_logprob, *inputs, grad, tail_eps=2**-6)
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch_head, torch_head_backward):
            patch.setattr(module, "ROWS", rows)
            patch.setattr(module, "COLUMNS", 128 * blocks)
        cut = gradients(linear_logprob, *inputs, grad, tail_eps=2**-6)
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-11)


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


def test_stats_survive_a_second_backward():
    hidden, weight, targets, _, grad = make(8, 8, 500)
    logps, stats = linear_logprob(hidden, weight, targets, return_stats=True, tail="exact")
    logps.backward(grad, retain_graph=True)
    logps.backward(grad)
    assert stats.active_fraction == 1
    assert stats.dense == 1


def test_shared_with_the_embedding():
    """A tied weight gets the sum of both gradients."""
    _, weight, targets, _, _ = make(9, 8, 300)
    weight.grad = None
    hidden = torch.nn.functional.embedding(targets, weight) * 0.5
    linear_logprob(hidden, weight, targets, tail="exact").sum().backward()
    got, weight.grad = weight.grad, None
    hidden = torch.nn.functional.embedding(targets, weight) * 0.5
    reference.linear_logprob(hidden, weight, targets).sum().backward()
    torch.testing.assert_close(got, weight.grad)


def test_autocast_rounds_inputs_and_keeps_the_weight():
    hidden, weight, targets, bias, grad = make(20, 16, 500, torch.float32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logprob(hidden.bfloat16(), weight, targets, bias=bias, tail="exact")
    _, d_weight = torch.autograd.grad(logps, (hidden, weight), grad.float())
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight, bias)]
    expected, expected_grads = gradients(
        reference.linear_logprob, rounded[0], rounded[1], targets, rounded[2], grad
    )
    assert (logps - expected).abs().max() < 2e-5
    assert d_weight.dtype == torch.float32
    assert relative(d_weight, expected_grads[1]) < 1e-5


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_compiles_as_one_graph(mode):
    hidden, weight, targets, _, _ = make(12, 8, 700, torch.float32)

    def scored(hidden, weight):
        return (linear_logprob(hidden * 1.5, weight, targets) ** 2).sum()

    expected = torch.autograd.grad(scored(hidden, weight), (hidden, weight))
    compiled = torch.compile(scored, fullgraph=True, backend=mode)
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    torch.testing.assert_close(got, expected)


def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    hidden, weight, targets, _, grad = make(12, 8, 700)
    plain = gradients(linear_logprob, hidden, weight, targets, None, grad)[1]
    out = checkpoint(linear_logprob, hidden, weight, targets, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out, (hidden, weight), grad), plain)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "hidden"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "hidden"),
        ({"weight": torch.zeros(5, 3)}, "weight"),
        ({"weight": torch.zeros(0, 4)}, "ZeRO-3"),
        ({"weight": torch.zeros(5, 4).bfloat16()}, "autocast"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(3)}, "targets"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"softcap": 0.0}, "softcap"),
        ({"tail": "average"}, "tail"),
        ({"tail_eps": 0.0}, "tail_eps"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_errors_name_the_argument(change, named):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=named):
        linear_logprob(**(arguments | change))
