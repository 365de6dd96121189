"""The kernels on a small case, against the plain definitions in fp64: a check of a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import reference
from ...kernels.checks import Backend, choose_backend
from ...kernels.linear_logprob.function import linear_logprob
from ...kernels.margin_loss.function import margin_loss
from .findings import cause

TOKENS, HIDDEN, VOCABULARY, PAIRS = 96, 64, 1000, 4

BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Largest error accepted, relative to the largest value: several times what rounding makes."""


@dataclass
class KernelCheck:
    """One op on one backend: its name, and its errors or the exception that it raised."""

    name: str
    errors: dict[str, float]
    bound: float
    raised: str = ""

    @property
    def fine(self) -> bool:
        # Written so that NaN is not fine.
        return not self.raised and all(error <= self.bound for error in self.errors.values())

    @property
    def detail(self) -> str:
        if self.raised:
            return self.raised
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"relative error of {errors} (at most {self.bound:.0e})"


def kernel_checks() -> Iterator[KernelCheck]:
    """`linear_logprob` and `margin_loss`, forward and backward, on every backend of this machine.

    Failures are in the results; nothing is raised.
    """
    for device, backend in available_backends():
        dtypes = (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,)
        for dtype in dtypes:
            where = f"{backend} on {device}, {str(dtype).removeprefix('torch.')}"
            yield _checked(f"linear_logprob ({where})", dtype, _head_errors, device, backend)
        yield _checked(
            f"margin_loss ({backend} on {device})", torch.float32, _loss_errors, device, backend
        )


def available_backends() -> list[tuple[str, Backend]]:
    """(device, backend) of those that can run here, the one "auto" takes last."""
    backends: list[tuple[str, Backend]] = [("cpu", "torch")]
    if torch.cuda.is_available():
        backends.append(("cuda", "torch"))
        if head_backend("cuda") == "triton":
            backends.append(("cuda", "triton"))
    return backends


def head_backend(device: str) -> str:
    """The head backend that ``head_backend: auto`` means on ``device``."""
    return choose_backend("auto", torch.empty(1, 1, device=device), torch.float32)


def _checked(
    name: str,
    dtype: torch.dtype,
    errors: Callable[[str, Backend, torch.dtype], dict[str, float]],
    device: str,
    backend: Backend,
) -> KernelCheck:
    try:
        return KernelCheck(name, errors(device, backend, dtype), BOUNDS[dtype])
    except Exception as error:  # of a driver, a compiler, a kernel: each is a finding
        return KernelCheck(name, {}, BOUNDS[dtype], cause(error))


def _head_errors(device: str, backend: Backend, dtype: torch.dtype) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator).to(device)
    coefficients = torch.randn(TOKENS, generator=generator).to(device)
    inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logps = linear_logprob(inputs[0], inputs[1], targets, tail="exact", backend=backend)
    expected = reference.linear_logprob(exact[0], exact[1], targets)
    gradients = torch.autograd.grad((logps * coefficients).sum(), inputs)
    exact_gradients = torch.autograd.grad((expected * coefficients.double()).sum(), exact)
    names = ("gradients of hidden", "of weight")
    errors = map(_error, gradients, exact_gradients)
    return {"log-probs": _error(logps, expected), **dict(zip(names, errors, strict=True))}


def _loss_errors(device: str, backend: Backend, dtype: torch.dtype) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (2 * PAIRS,), generator=generator)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
    values = -torch.rand(int(lengths.sum()), generator=generator).to(device, dtype)
    logps, exact = values.requires_grad_(), values.detach().double().requires_grad_()
    margins = torch.linspace(0, 1, PAIRS, device=device)
    losses = margin_loss(logps, bounds, margins, beta=2.0, backend=backend)
    expected = reference.margin_loss(exact, bounds, margins.double(), beta=2.0)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    (exact_gradient,) = torch.autograd.grad(expected.sum(), exact)
    return {"losses": _error(losses, expected), "gradients": _error(gradient, exact_gradient)}


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()
