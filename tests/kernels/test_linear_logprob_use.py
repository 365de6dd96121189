"""The head where it is used: frozen or missing inputs, bad tokens, autocast, compile, errors."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from widemargin.kernels import reference
from widemargin.kernels.linear_logprob import operators
from widemargin.kernels.linear_logprob.function import linear_logprob
from widemargin.kernels.linear_logprob.routing import top_columns, top_shares
from widemargin.kernels.linear_logprob.torch_forward import forward
from widemargin.kernels.linear_logprob.types import HeadCall
from widemargin.kernels.margin_loss import margin_loss

from tests.support.head_cases import gradients, make, relative


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


def test_stats_survive_a_second_backward():
    hidden, weight, targets, _, grad = make(8, 8, 500)
    logps, stats = linear_logprob(hidden, weight, targets, return_stats=True, tail="exact")
    logps.backward(grad, retain_graph=True)
    logps.backward(grad)
    assert stats.active_fraction == 1
    assert stats.dense == 1


def test_results_may_be_overwritten():
    """Losses put zeros where a mask says so."""

    def total(overwrite):
        hidden, weight, targets, _, _ = make(9, 8, 300)
        logps, entropy = linear_logprob(hidden, weight, targets, tail="exact", return_entropy=True)
        logps, entropy = (x if overwrite else x.clone() for x in (logps, entropy))
        logps[3:5] = 0
        entropy.clamp_(max=4)
        return torch.autograd.grad(logps.sum() + entropy.sum(), (hidden, weight))

    torch.testing.assert_close(total(overwrite=True), total(overwrite=False), rtol=0, atol=0)


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


def test_compiles_with_numbers_that_change():
    """torch.compile makes symbols of them, which have no repr in a graph."""
    hidden, weight, targets, _, _ = make(12, 8, 700)

    def scored(scale):
        numbers = {"logit_scale": scale, "softcap": 30 / scale, "temperature": scale / 2}
        return linear_logprob(hidden, weight, targets, **numbers, tail_eps=scale / 1000)

    compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 1.5, 2.5):
        torch.testing.assert_close(compiled(scale), scored(scale))


def test_statistics_are_left_to_eager_code_where_a_graph_may_break():
    hidden, weight, targets, _, _ = make(12, 8, 700)

    def scored(hidden):
        return linear_logprob(hidden, weight, targets, return_stats=True)

    with pytest.raises(Exception, match="return_stats: leave it out"):
        torch.compile(scored, fullgraph=True, backend="aot_eager")(hidden)
    torch.compiler.reset()
    logps, stats = torch.compile(scored, backend="aot_eager")(hidden)
    logps.sum().backward()
    assert not stats.active_fraction.isnan()


def test_changing_sizes_make_at_most_two_graphs():
    """One for the first size, and one for all others."""
    _, weight, _, bias, _ = make(1, 8, 700, torch.float32, bias=True)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(hidden, targets, cu_seqlens):
        logps = linear_logprob(hidden * 1.5, weight, targets, bias=bias)
        return margin_loss(logps, cu_seqlens, torch.zeros(1), beta=2.0).sum()

    for n in (12, 13, 20, 64, 33, 129, 2):
        hidden, _, targets, _, _ = make(n, 8, 700, torch.float32, seed=n)
        loss(hidden, targets, torch.tensor([0, n // 2, n])).backward()
        assert hidden.grad is not None
    assert counter.frame_count <= 2


def test_fake_and_real_results_have_the_same_strides():
    """Inductor's code reads what the operators return by the strides that the fakes have."""
    hidden, weight, targets, bias, grad = make(6, 8, 300, torch.float32, bias=True)
    hidden, weight, bias = (x.detach() for x in (hidden.T.contiguous().T, weight, bias))
    weight = weight.T.contiguous().T
    settings = (1.0, None, "mean", 2**-4, torch.float32, "torch")
    inputs = (hidden, weight, targets, bias)
    asked = [True] * 4
    kept = operators.forward_op(*inputs, None, *settings, True, asked)
    of_entropy = (kept[5], None)
    arguments = (grad.float(), *inputs, None, *kept[:5], *of_entropy, *settings, [True] * 3)
    real = (*kept, *operators.backward_op(*arguments))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake = operators.forward_op(*fakes[1:5], None, *settings, True, asked)
        fake = (*fake, *operators.backward_op(*fakes))
    for mine, expected in zip(fake, real, strict=True):
        assert (mine.shape, mine.dtype) == (expected.shape, expected.dtype)
        assert mine.stride() == expected.stride()


def test_products_stay_ieee_until_the_last_thread_leaves():
    backends: Any = torch.backends
    mkldnn = backends.mkldnn.matmul
    before, mkldnn.fp32_precision = mkldnn.fp32_precision, "bf16"
    try:
        with ExitStack() as first, ExitStack() as second:
            first.enter_context(operators.ieee_products)
            assert mkldnn.fp32_precision == "ieee"
            second.enter_context(operators.ieee_products)
            first.close()
            assert mkldnn.fp32_precision == "ieee"
            second.close()
            assert mkldnn.fp32_precision == "bf16"
    finally:
        mkldnn.fp32_precision = before


def test_gradient_checkpointing():
    from torch.utils.checkpoint import checkpoint

    hidden, weight, targets, _, grad = make(12, 8, 700)
    plain = gradients(linear_logprob, hidden, weight, targets, None, grad)[1]
    out = checkpoint(linear_logprob, hidden, weight, targets, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out, (hidden, weight), grad), plain)


def test_second_derivatives_are_refused():
    hidden, weight, targets, _, grad = make(6, 8, 300)
    logps = linear_logprob(hidden, weight, targets)
    (first,) = torch.autograd.grad(logps, hidden, grad, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first.sum(), weight)


def test_forward_mode_is_refused():
    """It would have given derivatives of zero."""
    hidden, weight, targets, _, _ = make(6, 8, 300)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda h: linear_logprob(h, weight, targets), (hidden,), (hidden,))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_functional_derivatives_are_refused(transform):
    hidden, weight, targets, _, _ = make(6, 8, 300)
    with pytest.raises(NotImplementedError, match="linear_logprob: use backward"):
        transform(lambda h: linear_logprob(h, weight, targets).sum())(hidden)


def test_a_weight_in_pieces_is_refused():
    class Piece(torch.Tensor):
        """What torch.distributed's DTensor has."""

        def full_tensor(self) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    hidden, weight, targets, _, _ = make(6, 8, 300)
    pieces = weight.detach().as_subclass(Piece)
    with pytest.raises(ValueError, match=r"weight: expected a plain tensor.*got Piece"):
        linear_logprob(hidden, pieces, targets)
    assert linear_logprob(hidden, pieces.full_tensor(), targets).shape == (6,)


def test_shapes_on_the_meta_device():
    hidden, weight, targets, _, _ = make(6, 8, 300)
    moved = (x.detach().to("meta") for x in (hidden, weight, targets))
    assert linear_logprob(*moved).shape == (6,)


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
        ({"hidden": [[0.0] * 4] * 3}, "hidden: expected a tensor, got list"),
        ({"targets": np.zeros(3, np.int64)}, "targets: expected a tensor, got ndarray"),
        ({"targets": torch.tensor([0, 1, 5])}, r"targets: expected ids in \[0, 5\).*got 5"),
        ({"targets": torch.tensor([0, 1, -1])}, r"or -100.*got -1"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias"),
        ({"logit_scale": None}, "logit_scale"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"logit_scale": torch.ones((), requires_grad=True)}, "logit_scale.*multiply hidden"),
        ({"softcap": "30"}, "softcap.*got '30'"),
        ({"softcap": np.float32(30)}, r"softcap.*got np.float32\(30.0\)"),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [77, 256, 700])
def test_forward_keeps_each_blocks_largest_element(vocabulary, dtype):
    hidden, weight, targets, _, _ = make(9, 8, vocabulary, dtype)
    call = HeadCall(hidden.detach(), weight.detach(), None, 1.0, 3.0, dtype)
    saved = forward(call, targets, keep=True, profile=True, tops=True)
    z = reference.head_logits(call.hidden, call.weight, softcap=3.0)
    shares, columns = top_shares(saved.tops), top_columns(saved.tops)
    for b, block in enumerate(z.split(128, dim=1)):
        assert torch.equal(columns[b], block.argmax(1))
        expected = block.softmax(1).amax(1)
        torch.testing.assert_close(shares[b].to(dtype), expected, rtol=2**-15, atol=0)


def test_of_equal_largest_elements_one_is_kept():
    call = HeadCall(torch.zeros(2, 4), torch.zeros(200, 4), None, 1.0, None, torch.float32)
    tops = forward(call, torch.zeros(2, dtype=torch.int64), keep=True, profile=True, tops=True).tops
    shares, columns = top_shares(tops), top_columns(tops)
    torch.testing.assert_close(1 / shares[:, 0], torch.tensor([128.0, 72.0]), rtol=2**-15, atol=0)
    assert (columns < torch.tensor([[128], [72]])).all()
