"""Random inputs of the head, its options in combination, and how results are compared."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from widemargin.kernels import reference

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


class TailCase(NamedTuple):
    """Gradients as the tails are defined; active: share of pairs; tops: elements on their own."""

    gradients: list[torch.Tensor]
    active: float
    tops: int


@torch.no_grad()
def tail_gradients(
    hidden, weight, targets, bias, grad, tail, eps, logit_scale=1.0, softcap=None, shards=None
):
    """Targets and tops exact on their own; every inactive pair's other mass averaged or dropped.

    Args:
        shards: numbers of rows, from the first of which blocks are counted; None for all rows.
    """
    z = reference.head_logits(hidden, weight, bias, logit_scale, softcap)
    slope = 1 - (z / softcap) ** 2 if softcap else torch.ones_like(z)
    p, d_logits, rows = z.softmax(-1), torch.zeros_like(z), torch.arange(len(z))
    bound = eps * grad.abs().mean() / grad.abs()
    pairs, elements = 0, 0
    parts = torch.arange(z.shape[1]).split(shards or [z.shape[1]])
    for block in (block for part in parts for block in part.split(128)):
        inside, own_slope = p[:, block], slope[:, block]
        mass, column = inside.sum(-1), targets - block[0]
        profile = (inside / mass[:, None] * own_slope).mean(0)
        held = (column >= 0) & (column < len(block))
        rest = torch.where(held, mass - p[rows, targets], mass)
        top = len(block) - 1 - inside.flip(1).argmax(1)  # the last of equal ones
        top_p = inside[rows, top]
        alone = (top_p >= bound / 4) & (top != column)
        rest = torch.where(alone, rest - top_p, rest)
        active = rest >= bound
        active |= active.sum() > 0.75 * len(z)
        here = -inside * own_slope
        here[held, column[held]] = 0
        spread = -rest[:, None] * profile if tail == "mean" else torch.zeros_like(here)
        alone &= ~active
        spread[alone, top[alone]] += here[alone, top[alone]]
        d_logits[:, block] = torch.where(active[:, None], here, spread)
        pairs, elements = pairs + int(active.sum()), elements + int(alone.sum())
    d_logits[rows, targets] += (1 - p[rows, targets]) * slope[rows, targets]
    d_logits *= grad[:, None] * logit_scale
    found = [d_logits @ weight, d_logits.T @ hidden, d_logits.sum(0)]
    return TailCase(found, pairs * 128 / z.numel(), elements)
