"""What the Triton backend of margin_loss promises beyond test_margin_loss.py's agreement.

Natively where there is a CUDA device, else in Triton's interpreter. Memory that a kernel should
have written and did not is NaN: torch fills fresh tensors when asked for deterministic algorithms.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from widemargin.kernels import reference
from widemargin.kernels.margin_loss import triton_operators
from widemargin.kernels.margin_loss.function import margin_loss, sequence_logps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LENGTHS: dict[str, list[tuple[int, int]]] = {
    "one pair": [(3, 4)],
    "one pair without tokens": [(0, 0)],
    "empty chosen": [(0, 5), (2, 2)],
    "empty rejected": [(5, 0), (2, 2)],
    "empty at the end": [(2, 2), (5, 0)],
    "all empty": [(0, 0)] * 3,
    "one token beside 5000": [(1, 5000), (5000, 1)],
    "around a block": [(1023, 1024), (1025, 2048), (2049, 1)],
    "300 pairs": [(1 + 7 * i % 13, 1 + 5 * i % 11) for i in range(300)],
    "no pairs": [],
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def batch(lengths, dtype=torch.float32, index=torch.int32, padding=0, seed=0):
    """token_logps [N + padding] requiring grad, cu_seqlens and margins, on the device."""
    flat = [n for n, _ in lengths] + [n for _, n in lengths]
    cu_seqlens = torch.tensor([0, *flat]).cumsum(0).to(index)
    generator = torch.Generator().manual_seed(seed)
    tokens = -torch.rand(sum(flat), generator=generator) * 3
    tokens = torch.cat([tokens, torch.full((padding,), torch.nan)])
    margins = torch.randn(len(lengths), generator=generator)
    return tokens.to(DEVICE, dtype).requires_grad_(), cu_seqlens.to(DEVICE), margins.to(DEVICE)


def loss_and_grad(op, tokens, cu_seqlens, margins, **options):
    losses = op(tokens, cu_seqlens, margins, beta=2.5, **options)
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype, device=losses.device)
    (grad,) = torch.autograd.grad((losses * weights).sum(), tokens)
    return losses.detach(), grad


@pytest.mark.costly
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(
    ("kind", "index"), [("sigmoid", torch.int32), ("hinge", torch.int64)], ids=str
)
def test_awkward_shapes(name, kind, index):
    tokens, cu_seqlens, margins = batch(LENGTHS[name], index=index, padding=3)
    exact = tokens.detach().double().requires_grad_()
    losses, grad = loss_and_grad(
        margin_loss, tokens, cu_seqlens, margins, kind=kind, backend="triton"
    )
    expected_losses, expected_grad = loss_and_grad(
        reference.margin_loss, exact, cu_seqlens, margins.double(), kind=kind
    )
    assert losses.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-9)
    assert (grad[int(cu_seqlens[-1]) :] == 0).all()


@pytest.mark.costly
@pytest.mark.parametrize("name", LENGTHS)
def test_awkward_shapes_of_sums(name):
    tokens, cu_seqlens, _ = batch(LENGTHS[name], padding=3)
    sums, lengths = sequence_logps(tokens, cu_seqlens, backend="triton")
    expected, expected_lengths = reference.sequence_logps(tokens.detach().double(), cu_seqlens)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(lengths, expected_lengths)
    sums.sum().backward()  # an expanded gradient, as a mean would give
    inside = int(cu_seqlens[-1])
    assert (tokens.grad[:inside] == 1).all()
    assert (tokens.grad[inside:] == 0).all()


def test_losses_keep_their_relative_precision():
    gaps = torch.linspace(-12, 12, 97)  # the smallest loss is 6e-6: lost if logs were of 1 + u
    tokens = torch.cat([gaps, torch.zeros(97)])
    cu_seqlens, margins = torch.arange(195), torch.zeros(97)
    there = [t.to(DEVICE) for t in (tokens, cu_seqlens, margins)]
    losses = margin_loss(there[0], there[1], there[2], beta=1.0, backend="triton")
    expected = reference.margin_loss(tokens.double(), cu_seqlens, margins.double(), beta=1.0)
    torch.testing.assert_close(losses.cpu().double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradients_keep_their_dtype(dtype):
    tokens, cu_seqlens, margins = batch(LENGTHS["around a block"], dtype)
    exact = tokens.detach().double().requires_grad_()
    losses, grad = loss_and_grad(margin_loss, tokens, cu_seqlens, margins, backend="triton")
    expected_losses, expected_grad = loss_and_grad(
        reference.margin_loss, exact, cu_seqlens, margins.double()
    )
    assert losses.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-6)
    rounding = torch.finfo(dtype).eps  # the interpreter truncates on a store to bf16
    tiny = torch.finfo(dtype).smallest_normal * rounding
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rounding, atol=tiny)


@pytest.mark.costly
def test_gradient_agrees_with_finite_differences():
    tokens, cu_seqlens, margins = batch([(3, 2), (1, 4), (0, 2)])
    step = 1e-2
    for smoothing in (0.0, 0.2):
        _, grad = loss_and_grad(
            margin_loss, tokens, cu_seqlens, margins, label_smoothing=smoothing, backend="triton"
        )
        shifted = tokens.detach() + step * torch.eye(len(tokens), device=DEVICE)
        back = tokens.detach() - step * torch.eye(len(tokens), device=DEVICE)

        def total(row, smoothing=smoothing):
            options = {"beta": 2.5, "label_smoothing": smoothing, "backend": "triton"}
            losses = margin_loss(row, cu_seqlens, margins, **options)
            return (losses * torch.linspace(0.5, 1.5, len(losses), device=DEVICE)).sum()

        slopes = [(total(a) - total(b)) / (2 * step) for a, b in zip(shifted, back, strict=True)]
        torch.testing.assert_close(grad, torch.stack(slopes), rtol=2e-3, atol=2e-4)


def test_strided_inputs_and_gradients():
    tokens, cu_seqlens, margins = batch(LENGTHS["around a block"])
    expected = loss_and_grad(margin_loss, tokens, cu_seqlens, margins, backend="triton")
    spread = [torch.stack([t, torch.full_like(t, 7)], 1)[:, 0] for t in (tokens.detach(), margins)]
    strided_cu = torch.stack([cu_seqlens, cu_seqlens], 1)[:, 0]
    again = loss_and_grad(
        margin_loss, spread[0].requires_grad_(), strided_cu, spread[1], backend="triton"
    )
    assert torch.equal(expected[0], again[0])
    assert torch.equal(expected[1], again[1])
    losses = margin_loss(tokens, cu_seqlens, margins, beta=2.5, backend="triton")
    columns = torch.linspace(0.5, 1.5, len(losses), device=DEVICE)[:, None].repeat(1, 3)
    (grad,) = torch.autograd.grad(losses, tokens, columns[:, 1])
    assert torch.equal(grad, expected[1])


def test_repeats_bit_for_bit():
    tokens, cu_seqlens, margins = batch(LENGTHS["one token beside 5000"])
    first = loss_and_grad(margin_loss, tokens, cu_seqlens, margins, backend="triton")
    again = loss_and_grad(margin_loss, tokens, cu_seqlens, margins, backend="triton")
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_only_the_logps_get_a_gradient():
    tokens, cu_seqlens, margins = batch(LENGTHS["one pair"])
    margins.requires_grad_()
    margin_loss(tokens, cu_seqlens, margins, beta=1.0, backend="triton").sum().backward()
    assert margins.grad is None
    frozen = margin_loss(tokens.detach(), cu_seqlens, margins, beta=1.0, backend="triton")
    assert not frozen.requires_grad


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_second_derivatives_are_refused(kind):
    """A gradient that looks like a constant would make a penalty of it do nothing."""
    tokens, cu_seqlens, margins = batch(LENGTHS["one pair"])
    losses = margin_loss(tokens, cu_seqlens, margins, beta=1.0, kind=kind, backend="triton")
    (first,) = torch.autograd.grad(losses.sum(), tokens, create_graph=True)
    with pytest.raises(NotImplementedError, match="margin_loss: it has no second derivative"):
        first.square().sum().backward()


def test_sums_have_a_second_derivative():
    tokens, cu_seqlens, _ = batch(LENGTHS["empty at the end"])

    def penalty(op, **options):
        squares = op(tokens, cu_seqlens, **options)[0] ** 2
        (first,) = torch.autograd.grad(squares.sum(), tokens, create_graph=True)
        return torch.autograd.grad(first.square().sum(), tokens)[0]

    expected = penalty(reference.sequence_logps)
    torch.testing.assert_close(penalty(sequence_logps, backend="triton"), expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_functional_derivatives_are_refused(transform):
    tokens, cu_seqlens, margins = batch(LENGTHS["one pair"])
    with pytest.raises(NotImplementedError, match="margin_loss: use backward"):
        transform(lambda x: margin_loss(x, cu_seqlens, margins, beta=1.0, backend="triton").sum())(
            tokens
        )


def test_forward_mode_is_refused():
    """It would have given derivatives of zero."""
    tokens, cu_seqlens, _ = batch(LENGTHS["one pair"])
    with pytest.raises(NotImplementedError, match=r"sequence_logps: .* forward mode"):
        torch.func.jvp(
            lambda x: sequence_logps(x, cu_seqlens, backend="triton")[0], (tokens,), (tokens,)
        )


@pytest.mark.costly
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_to_one_graph_for_any_length(backend):
    torch.compiler.reset()

    def both(tokens, cu_seqlens, margins):
        sums, lengths = sequence_logps(tokens, cu_seqlens, backend="triton")
        losses = margin_loss(tokens, cu_seqlens, margins, beta=2.5, backend="triton")
        return losses.mean() + 0.1 * (sums / lengths.clamp(min=1)).mean()

    compiled = torch.compile(both, fullgraph=True, backend=backend, dynamic=True)
    for name in ("around a block", "300 pairs", "empty chosen"):
        tokens, cu_seqlens, margins = batch(LENGTHS[name])
        expected, loss = both(tokens, cu_seqlens, margins), compiled(tokens, cu_seqlens, margins)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        expected_grad = torch.autograd.grad(expected, tokens)
        torch.testing.assert_close(
            torch.autograd.grad(loss, tokens), expected_grad, rtol=1e-5, atol=0
        )


def test_operators_are_registered_as_torch_wants_them():
    tokens, cu_seqlens, margins = batch(LENGTHS["empty rejected"])
    torch.library.opcheck(triton_operators.sequence_sums, (tokens, cu_seqlens))
    for hinge in (False, True):
        arguments = (tokens, cu_seqlens, margins, 2.5, hinge, 0.0)
        torch.library.opcheck(triton_operators._loss_op, arguments)


def test_takes_a_dtype_it_has_kernels_for():
    tokens, cu_seqlens, margins = batch(LENGTHS["one pair"], torch.float64)
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp16, got torch\.float64"):
        margin_loss(tokens, cu_seqlens, margins, beta=1.0, backend="triton")
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp16, got torch\.float64"):
        sequence_logps(tokens, cu_seqlens, backend="triton")
    assert margin_loss(tokens, cu_seqlens, margins, beta=1.0).dtype == torch.float64


WITHOUT_INTERPRETER = """
import sys, torch
from widemargin.kernels.margin_loss import margin_loss
arguments = torch.zeros(2), torch.tensor([0, 1, 2]), torch.zeros(1)
margin_loss(*arguments, beta=1.0)
assert "triton" not in sys.modules, "auto imported triton on a CPU"
try:
    margin_loss(*arguments, beta=1.0, backend="triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.costly
def test_a_cpu_without_the_interpreter_is_an_error_that_says_so():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_INTERPRETER], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "takes CUDA tensors, got cpu" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout


@pytest.mark.skipif(DEVICE == "cuda", reason="auto takes Triton on CUDA")
def test_auto_is_torch_on_a_cpu_even_in_the_interpreter(monkeypatch):
    def refuse(*_):
        raise AssertionError("the Triton path was taken")

    monkeypatch.setattr(triton_operators, "margin_losses", refuse)
    monkeypatch.setattr(triton_operators, "sequence_sums", refuse)
    tokens, cu_seqlens, margins = batch(LENGTHS["one pair"])
    margin_loss(tokens, cu_seqlens, margins, beta=1.0)
    sequence_logps(tokens, cu_seqlens)


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu_without_waiting_for_it(monkeypatch):
    tokens, cu_seqlens, margins = batch(LENGTHS["around a block"])
    expected = loss_and_grad(margin_loss, tokens, cu_seqlens, margins, backend="triton")
    taken = []
    launch = triton_operators.margin_losses
    monkeypatch.setattr(
        triton_operators, "margin_losses", lambda *a: (taken.append(True), launch(*a))[1]
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = loss_and_grad(margin_loss, tokens, cu_seqlens, margins)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert taken
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])
