"""Random inputs of the head, its options in combination, and how results are compared."""

from __future__ import annotations

import pytest
import torch

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
