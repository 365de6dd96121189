"""Which (token, vocabulary block) pairs the head's backward has to compute; the target apart.

Shapes: N tokens, V vocabulary, B vocabulary blocks of ``BLOCK`` rows. The forward's partial
logsumexps give the exact probability that each token puts on each block; nearly all of it sits on a
few blocks. The routing width is the same on every device, so results do not depend on the chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .types import HeadCall

BLOCK = 128
_TARGET_ROWS = 1024
"""Tokens whose targets' weight rows are gathered at a time."""


def num_blocks(vocabulary: int) -> int:
    """Vocabulary blocks of ``BLOCK`` rows, the last one possibly ragged."""
    return -(-vocabulary // BLOCK)


def block_masses(partial_lse: Tensor, lse: Tensor, logps: Tensor, targets: Tensor) -> Tensor:
    """Probability on each block apart from the target's, [B, N].

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
        every_pair = torch.ones_like(partial_lse, dtype=torch.bool)
        return Routed(every_pair, torch.zeros_like(partial_lse))
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


def target_grads(call: HeadCall, grad: Tensor, logps: Tensor, targets: Tensor) -> Tensor:
    """Gradients ``g (1 - p)`` [N] of the targets' logits before the softcap.

    ``1 - p`` is computed as such, so no digits cancel where p is close to 1.
    """
    grads = grad * -torch.expm1(logps)
    return grads if call.softcap is None else grads * _target_slopes(call, targets, call.softcap)


def _target_slopes(call: HeadCall, targets: Tensor, softcap: float) -> Tensor:
    """Derivative of the softcap at each token's target [N], from the logit before it.

    ``1 / cosh^2`` keeps its digits where the softcap saturates, as ``1 - tanh^2`` does not.
    """
    dtype = torch.promote_types(call.compute_dtype, torch.float32)
    logits = targets.new_empty(targets.shape, dtype=dtype)
    for row in range(0, len(targets), _TARGET_ROWS):
        rows = slice(row, row + _TARGET_ROWS)
        weight = call.weight[targets[rows]].to(call.compute_dtype).to(dtype)
        logits[rows] = (call.hidden[rows].to(call.compute_dtype).to(dtype) * weight).sum(1)
    if call.bias is not None:
        logits += call.bias[targets].to(call.compute_dtype)
    return torch.cosh(logits * (call.logit_scale / softcap)).pow(-2)
