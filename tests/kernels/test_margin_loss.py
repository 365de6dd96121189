"""margin_loss and sequence_logps against their plain definitions, and what they promise.

Both backends take the same tests: torch on the CPU; Triton natively where there is a CUDA device,
else in its interpreter (conftest.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from widemargin.kernels import reference
from widemargin.kernels.checks import TRITON_DTYPES
from widemargin.kernels.margin_loss.function import margin_loss, sequence_logps

from tests.support.preference_batches import Pair, gap, nll, pack, random_pairs, sigmoid

DEVICES = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
KINDS = [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0)]
BATCHES: dict[str, list[Pair]] = {
    "one token each": [([-0.5], [-1.5])],
    "mixed": random_pairs(np.random.default_rng(0), 5),
    "long": random_pairs(np.random.default_rng(1), 3, longest=700),
    "empty chosen": [([], [-0.5, -3.0]), ([-0.1], [-0.2, -0.3])],
    "empty rejected": [([-1.0, -2.0], []), ([-0.1], [-0.2, -0.3])],
    "empty pair": [([], []), ([-0.1], [-0.2, -0.3])],
    "no tokens at all": [([], [])],
    "no pairs": [],
}
# Per dtype: how far a loss or a gradient may be from the definition in fp64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
CASES = [("torch", dtype) for dtype in TOLERANCE] + [("triton", dtype) for dtype in TRITON_DTYPES]


def losses_of(backend, tokens, cu_seqlens, margins, **options) -> torch.Tensor:
    """Losses on the CPU, computed by ``backend`` on its device; gradients find their way back."""
    there = [t.to(DEVICES[backend]) for t in (tokens, cu_seqlens, margins)]
    return margin_loss(there[0], there[1], there[2], backend=backend, **options).cpu()


def margins_for(pairs: list[Pair]) -> torch.Tensor:
    return torch.linspace(-1, 2, len(pairs), dtype=torch.float64)


@pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
@pytest.mark.parametrize(("kind", "smoothing"), KINDS)
@pytest.mark.parametrize("name", BATCHES)
def test_matches_the_definition(name, kind, smoothing, backend, dtype):
    pairs = BATCHES[name]
    tokens, cu_seqlens = pack(pairs, dtype)
    exact = tokens.detach().double().requires_grad_()
    margins = margins_for(pairs)
    options = {"beta": 2.5, "kind": kind, "label_smoothing": smoothing}
    losses = losses_of(backend, tokens, cu_seqlens, margins, **options)
    expected = reference.margin_loss(exact, cu_seqlens, margins, **options)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), expected, rtol=TOLERANCE[dtype], atol=1e-12)
    weights = torch.linspace(0.5, 1.5, len(pairs), dtype=torch.float64)
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert tokens.grad is not None
    assert exact.grad is not None
    rounding = torch.finfo(dtype).eps  # of the gradient, stored in the dtype of the logps
    torch.testing.assert_close(
        tokens.grad.double(), exact.grad, rtol=TOLERANCE[dtype] + rounding, atol=1e-6 * rounding
    )


@pytest.mark.parametrize("name", BATCHES)
def test_definition_matches_plain_arithmetic(name):
    pairs = BATCHES[name]
    tokens, cu_seqlens = pack(pairs)
    margins = margins_for(pairs)
    x = [gap(pair, 2.0) - m for pair, m in zip(pairs, margins.tolist(), strict=True)]
    smooth = reference.margin_loss(tokens, cu_seqlens, margins, beta=2.0, label_smoothing=0.2)
    assert smooth.tolist() == pytest.approx([0.8 * nll(v) + 0.2 * nll(-v) for v in x], rel=1e-12)
    hinge = reference.margin_loss(tokens, cu_seqlens, margins, beta=2.0, kind="hinge")
    assert hinge.tolist() == pytest.approx([max(0.0, 1 - v) for v in x], rel=1e-12)


@pytest.mark.parametrize("name", BATCHES)
def test_sequence_logps(name):
    tokens, cu_seqlens = pack(BATCHES[name])
    sums, lengths = sequence_logps(tokens, cu_seqlens)
    expected_sums, expected_lengths = reference.sequence_logps(tokens, cu_seqlens)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-13, atol=0)
    assert torch.equal(lengths, expected_lengths)
    assert lengths.dtype == torch.int32


def test_sums_may_be_overwritten():
    tokens, cu_seqlens = pack(BATCHES["mixed"])
    sums, lengths = sequence_logps(tokens, cu_seqlens)
    sums /= lengths
    sums.sum().backward()
    torch.testing.assert_close(tokens.grad, (1 / lengths.double()).repeat_interleave(lengths))


@pytest.mark.parametrize("name", BATCHES)
def test_sequence_logps_in_triton(name):
    tokens, cu_seqlens = pack(BATCHES[name], torch.float32)
    exact = tokens.detach().double().requires_grad_()
    sums, lengths = sequence_logps(
        tokens.to(DEVICES["triton"]), cu_seqlens.to(DEVICES["triton"]), backend="triton"
    )
    expected_sums, expected_lengths = reference.sequence_logps(exact, cu_seqlens)
    torch.testing.assert_close(sums.cpu().double(), expected_sums, rtol=1e-6, atol=1e-6)
    assert torch.equal(lengths.cpu(), expected_lengths)
    weights = torch.linspace(0.5, 1.5, len(expected_sums))
    (sums.cpu() * weights).sum().backward()
    (expected_sums * weights).sum().backward()
    torch.testing.assert_close(tokens.grad.double(), exact.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "smoothing"), KINDS)
def test_gradcheck(kind, smoothing):
    tokens, cu_seqlens = pack(BATCHES["mixed"])
    margins = torch.linspace(-0.2, 0.7, 5, dtype=torch.float64)

    def losses(tokens):
        return margin_loss(
            tokens, cu_seqlens, margins, beta=2.0, kind=kind, label_smoothing=smoothing
        )

    assert torch.autograd.gradcheck(losses, tokens)


@pytest.mark.parametrize("distance", [-800.0, -50.0, -25.0, 25.0, 50.0, 800.0])
def test_far_from_the_margin(distance):
    tokens, cu_seqlens = pack([([distance], [0.0])])
    loss = margin_loss(tokens, cu_seqlens, torch.zeros(1), beta=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(nll(distance), rel=1e-14)
    assert tokens.grad is not None
    slope = -math.exp(-distance) / (1 + math.exp(-distance)) if distance > 0 else -1.0
    assert tokens.grad[0].item() == pytest.approx(slope, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(
    "distance", [-800.0, -50.0, -25.0, -7.0, 0.0, 1e-4, 7.0, 25.0, 50.0, 800.0]
)
@pytest.mark.parametrize("backend", DEVICES)
def test_far_from_the_margin_in_fp32(distance, backend):
    tokens, cu_seqlens = pack([([distance], [0.0])], torch.float32)
    loss = losses_of(backend, tokens, cu_seqlens, torch.zeros(1), beta=1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(nll(distance), rel=1e-5, abs=1e-38)
    assert tokens.grad[0].item() == pytest.approx(-sigmoid(-distance), rel=1e-5, abs=1e-38)
    assert tokens.grad[1].item() == -tokens.grad[0].item()


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)]
)
@pytest.mark.parametrize(("kind", "smoothing"), KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_stays_in_its_pair(bad, kind, smoothing, backend, dtype):
    pairs = random_pairs(np.random.default_rng(3), 4)
    clean, cu_seqlens = pack(pairs, dtype)
    pairs[1][1][0] = bad
    dirty, _ = pack(pairs, dtype)
    others = [0, 2, 3]
    options = {"beta": 2.0, "kind": kind, "label_smoothing": smoothing}
    losses = []
    for tokens in (clean, dirty):
        losses.append(losses_of(backend, tokens, cu_seqlens, margins_for(pairs), **options))
        losses[-1].sum().backward()
    expected = losses_of("torch", dirty, cu_seqlens, margins_for(pairs), **options)
    torch.testing.assert_close(losses[1], expected, equal_nan=True)
    (expected_grad,) = torch.autograd.grad(expected.sum(), dirty)
    torch.testing.assert_close(dirty.grad, expected_grad, equal_nan=True)
    assert torch.equal(losses[0][others], losses[1][others])
    assert clean.grad is not None
    assert dirty.grad is not None
    for pair in others:
        for sequence in (pair, 4 + pair):
            span = slice(int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1]))
            assert torch.equal(clean.grad[span], dirty.grad[span])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6), extra=st.integers(0, 5))
def test_order_and_padding_change_nothing(seed, count, extra):
    rng = np.random.default_rng(seed)
    pairs, order = random_pairs(rng, count), rng.permutation(count)
    tokens, cu_seqlens = pack(pairs)
    losses = margin_loss(tokens, cu_seqlens, margins_for(pairs), beta=2.0)
    shuffled, shuffled_cu = pack([pairs[i] for i in order])
    padded = torch.cat([shuffled, torch.full((extra,), torch.nan, dtype=torch.float64)])
    again = margin_loss(padded, shuffled_cu, margins_for(pairs)[order], beta=2.0)
    assert torch.equal(again, losses[order])
    (again.sum()).backward()
    assert shuffled.grad is not None
    assert shuffled.grad.isfinite().all()


def test_margins_are_constants():
    tokens, cu_seqlens = pack(BATCHES["mixed"])
    margins = torch.zeros(5, requires_grad=True)
    margin_loss(tokens, cu_seqlens, margins, beta=2.0).sum().backward()
    assert margins.grad is None


def test_reads_nothing_back_to_the_host():
    with FakeTensorMode():  # holds no values: reading one raises
        tokens = torch.randn(20, requires_grad=True)
        cu_seqlens = torch.zeros(7, dtype=torch.int32)
        margin_loss(tokens, cu_seqlens, torch.zeros(3), beta=2.0).sum().backward()


def test_compiles_to_one_graph():
    tokens, cu_seqlens = pack(BATCHES["mixed"])
    compiled = torch.compile(margin_loss, fullgraph=True, backend="aot_eager")
    options = {"beta": 2.0, "label_smoothing": 0.1}
    losses = compiled(tokens, cu_seqlens, margins_for(BATCHES["mixed"]), **options)
    expected = margin_loss(tokens, cu_seqlens, margins_for(BATCHES["mixed"]), **options)
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)


CU = torch.tensor([0, 1, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_logps": torch.zeros(1, 2)}, "token_logps"),
        ({"cu_seqlens": [0, 1, 2]}, "cu_seqlens: expected a tensor, got list"),
        ({"target_margins": 0.5}, "target_margins: expected a tensor, got float"),
        (
            {"cu_seqlens": torch.tensor([0, 1, 3])},
            r"from 0 to at most 2.*\[0, 1, 3\]",
        ),
        ({"cu_seqlens": torch.tensor([1, 1, 2])}, r"cu_seqlens: .*\[1, 1, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 1])}, r"cu_seqlens: .*ascending"),
        ({"beta": "2"}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"beta": torch.ones(())}, "beta"),
        ({"token_logps": torch.zeros(2, dtype=torch.int64)}, "token_logps"),
        ({"cu_seqlens": CU.double()}, "cu_seqlens"),
        ({"cu_seqlens": CU[:2]}, r"2P \+ 1"),
        ({"target_margins": torch.zeros(2)}, "target_margins"),
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"kind": "square"}, "sigmoid, hinge"),
        ({"label_smoothing": 0.6}, "label_smoothing"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "hinge"),
        ({"backend": "cuda"}, "auto, triton, torch"),
        ({"backend": "triton", "token_logps": torch.zeros(2, dtype=torch.float64)}, "bf16 or fp16"),
        ({"cu_seqlens": CU.to("meta")}, "device of token_logps"),
        ({"target_margins": torch.zeros(1, device="meta")}, "device of token_logps"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {
        "token_logps": torch.zeros(2),
        "cu_seqlens": CU,
        "target_margins": torch.zeros(1),
        "beta": 1.0,
    } | change
    with pytest.raises(ValueError, match=message):
        margin_loss(**arguments)


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_for_it():
    pairs = BATCHES["long"]
    tokens, cu_seqlens = pack(pairs)
    expected = reference.margin_loss(tokens, cu_seqlens, margins_for(pairs), beta=2.0)
    there = [t.detach().cuda() for t in (tokens, cu_seqlens, margins_for(pairs))]
    there[0].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = margin_loss(there[0], there[1], there[2], beta=2.0)
        losses.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected.sum().backward()
    assert there[0].grad is not None
    assert tokens.grad is not None
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(there[0].grad.cpu(), tokens.grad, rtol=1e-12, atol=1e-12)
