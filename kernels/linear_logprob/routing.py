"""Which (token, vocabulary block) pairs the head's backward has to compute.

Shapes: N tokens, B vocabulary blocks of ``BLOCK`` rows. The forward's partial logsumexps give the
exact probability that each token puts on each block; nearly all of it sits on a few blocks. The
routing width is the same on every device, so results do not depend on the chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128


def num_blocks(vocabulary: int) -> int:
    """Vocabulary blocks of ``BLOCK`` rows, the last one possibly ragged."""
    return -(-vocabulary // BLOCK)


def block_masses(partial_lse: Tensor, lse: Tensor, logps: Tensor, targets: Tensor) -> Tensor:
    """Probability on each block apart from the target's own, [B, N].

    The target's element is handled by itself and exactly, so a token that is sure of its target
    needs no block at all.

    Args:
        partial_lse: [B, N]. lse, logps: [N]. targets: [N], already in [0, V).
    """
    masses = torch.exp(partial_lse - lse)
    target_blocks = (targets // BLOCK)[None]
    rest = masses.gather(0, target_blocks) - torch.exp(logps)[None]
    return masses.scatter_(0, target_blocks, rest.clamp_min_(0.0))


def thresholds(grad: Tensor, scored: Tensor, tail_eps: float) -> Tensor:
    """The mass from which a token's pairs are active, [N]: ``tail_eps * mean|g| / |g_i|``.

    Tokens whose gradient has vanished cost nothing, and the mean, unlike the maximum, is not
    inflated by one very short answer. Infinite where the gradient is 0 or not finite.

    Args:
        grad: [N], 0 where not scored. scored: [N] bool.
    """
    size = grad.abs()
    finite = torch.isfinite(size)
    mean = torch.where(finite, size, 0.0).sum() / (finite & scored).sum().clamp_min(1)
    return torch.where(finite & (size > 0), tail_eps * mean / size, torch.inf)


def active_pairs(masses: Tensor, grad: Tensor, scored: Tensor, tail_eps: float) -> Tensor:
    """[B, N] bool: pairs whose mass reaches `thresholds`, so none of a token that is not finite."""
    return masses >= thresholds(grad, scored, tail_eps)


class Routed(NamedTuple):
    """active: [B, N] bool. averaged: [B, N], the mass left to the tail, 0 where active."""

    active: Tensor
    averaged: Tensor


def route(
    partial_lse: Tensor,
    lse: Tensor,
    logps: Tensor,
    targets: Tensor,
    grad: Tensor,
    scored: Tensor,
    tail_eps: float,
    full_fraction: float,
) -> Routed:
    """The pairs to compute, and the mass of all others.

    A block active for more than ``full_fraction`` of the tokens takes all of them. With
    ``tail_eps`` 0 (``tail="exact"``) every pair is active.
    """
    if tail_eps == 0:
        everything = torch.ones_like(partial_lse, dtype=torch.bool)
        return Routed(everything, torch.zeros_like(partial_lse))
    masses = block_masses(partial_lse, lse, logps, targets)
    active = active_pairs(masses, grad, scored, tail_eps)
    active |= active.sum(1, keepdim=True) > full_fraction * active.shape[1]
    return Routed(active, masses.masked_fill_(active, 0.0))


def routing_stats(routed: Routed, scored: Tensor) -> Tensor:
    """[4]: active fraction; averaged mass, mean and max; 1 if dense; all of scored tokens."""
    active, averaged = routed
    count = scored.sum().clamp_min(1)
    fraction = (active & scored).sum() / (count * max(len(active), 1))
    mass = torch.where(scored, averaged.sum(0), 0.0)
    top = mass.max() if mass.numel() else mass.sum()
    dense = (active | ~scored).all()
    return torch.stack([fraction.to(mass.dtype), mass.sum() / count, top, dense.to(mass.dtype)])
