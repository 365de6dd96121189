"""Times of the kernels for pytest-benchmark: `pytest bench --benchmark-only`.

`make bench-baseline` saves them, `make bench-compare` fails where one has become slower by more
than a stated share. Small enough for a CI machine; on a CUDA device the Triton kernels as well. The
figures that pages show come from `bench.head`, which checks every result first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from widemargin.kernels.linear_logprob.function import linear_logprob
from widemargin.kernels.margin_loss.function import margin_loss

from bench.head.providers import BASELINE, PROVIDERS
from bench.lib.cases import Case
from bench.lib.peaked import PeakedCase

pytest.importorskip("pytest_benchmark")

CASES = {
    "cpu": Case("cpu", 256, 128, 16384),
    "cuda": Case("cuda", 4096, 2048, 65536, "bfloat16"),
}
PAIRS = {"cpu": 32, "cuda": 128}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]
ROUNDS = {"rounds": 12, "warmup_rounds": 2, "iterations": 1}


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def inputs(device: str) -> PeakedCase:
    case = CASES[device].build(device)
    case.hidden.requires_grad_()
    case.weight.requires_grad_()
    return case


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return PROVIDERS[BASELINE].forward(hidden, weight, targets)[0]


HEADS: dict[str, Callable[..., Any]] = {
    "full-logits": full_logits,
    "mean": partial(linear_logprob, tail="mean"),
    "exact": partial(linear_logprob, tail="exact"),
}


def finished(result: Any) -> Any:
    """What was computed, once the device is done with it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


@pytest.mark.benchmark(group="head forward")
@pytest.mark.parametrize("head", HEADS)
def test_head_forward(benchmark: Any, inputs: PeakedCase, head: str) -> None:
    def run() -> Tensor:
        return finished(HEADS[head](inputs.hidden, inputs.weight, inputs.targets))

    logps = benchmark.pedantic(run, **ROUNDS)
    assert torch.isfinite(logps).all()


@pytest.mark.benchmark(group="head backward")
@pytest.mark.parametrize("head", HEADS)
def test_head_backward(benchmark: Any, inputs: PeakedCase, head: str) -> None:
    leaves = (inputs.hidden, inputs.weight)

    def setup() -> tuple[tuple[Tensor], dict[str, Any]]:
        return (finished(HEADS[head](*leaves, inputs.targets)),), {}

    def run(logps: Tensor) -> tuple[Tensor, ...]:
        return finished(torch.autograd.grad(logps, leaves, inputs.coefficients.to(logps.dtype)))

    gradients = benchmark.pedantic(run, setup=setup, **ROUNDS)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.fixture(scope="module")
def pairs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token logps [N], bounds of 2P sequences of 100 to 500 tokens, and margins [P]."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(100, 500, (2 * PAIRS[device],), generator=generator)
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    logps = -torch.rand(int(bounds[-1]), generator=generator)
    margins = torch.rand(PAIRS[device], generator=generator)
    return logps.to(device).requires_grad_(), bounds.to(device), margins.to(device)


@pytest.mark.benchmark(group="margin loss")
def test_margin_loss(benchmark: Any, pairs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Forward and backward: both are too short to be timed one by one."""
    logps, bounds, margins = pairs

    def run() -> Tensor:
        loss = margin_loss(logps, bounds, margins, beta=2.5).sum()
        return finished(torch.autograd.grad(loss, logps)[0])

    gradient = benchmark.pedantic(run, rounds=12, warmup_rounds=2, iterations=50)
    assert torch.isfinite(gradient).all()
