"""Which (token, vocabulary block) pairs the head's backward has to compute.

The target, and a block's largest element where it counts, are exact on their own and set apart.

Shapes: N tokens, V vocabulary, B vocabulary blocks of ``BLOCK`` rows. The forward's partial
logsumexps give the exact probability that each token puts on each block; nearly all of it sits on a
few blocks. The routing width is the same on every device, so results do not depend on the chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .types import EntropyGrad, GradRequest, HeadCall, Saved

BLOCK = 128
TOP_CUT = 1 / 4
"""Of the mass from which a pair is active, what a block's largest element must have to be exact on
its own. Smallest error for the work on SmolLM2's states at 2^-12 (1.6e-3 in dH at 0.15 of all pairs
without tops): 1/2 leaves 0.082 and 1.8e-3 with 34 tops a token, 1/4 0.076 and 1.5e-3 with 54, and
1/8 still 0.076 with 79."""
_TARGET_ROWS = 1024
"""Tokens whose targets' weight rows are gathered at a time."""


def num_blocks(vocabulary: int) -> int:
    """Vocabulary blocks of ``BLOCK`` rows, the last one possibly ragged."""
    return -(-vocabulary // BLOCK)


def blocked(chunk: Tensor, fill: float = 0.0) -> Tensor:
    """[n, v] as [n, v / BLOCK, BLOCK]; a ragged last block is filled up."""
    missing = -chunk.shape[1] % BLOCK
    if missing:
        chunk = torch.nn.functional.pad(chunk, (0, missing), value=fill)
    return chunk.view(len(chunk), -1, BLOCK)


def top_shares(tops: Tensor) -> Tensor:
    """Of each block's mass the share that its largest element has, fp32, of any `Saved.tops`."""
    return (tops & -BLOCK).view(torch.float32)


def top_columns(tops: Tensor) -> Tensor:
    """In which column of its block each largest element lies, int64, of any `Saved.tops`."""
    return (tops & BLOCK - 1).to(torch.int64)


def split_masses(saved: Saved, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Probability on each block apart from what is exact on its own [B, N], and its tops [B, N].

    On their own are the targets, so that a token that is sure of its target needs no block at all,
    and the largest element of a block (its top) where its mass reaches ``TOP_CUT`` of the bound.

    Args:
        bounds: [N], see `thresholds`.
    """
    masses = torch.exp(saved.partial_lse - saved.lse)
    blocks = (saved.targets.clamp_min(0) // BLOCK)[None]
    tops = torch.zeros_like(masses, dtype=torch.bool)
    if saved.tops.numel():
        top_masses = masses * top_shares(saved.tops)
        torch.ge(top_masses, TOP_CUT * bounds, out=tops)
        rows = blocks * BLOCK + top_columns(saved.tops.gather(0, blocks))
        tops.scatter_(0, blocks, tops.gather(0, blocks) & (rows != saved.targets))
        masses -= top_masses.masked_fill_(~tops, 0.0)
    held = torch.exp(saved.logps).where(saved.targets >= 0, 0.0)
    rest = masses.gather(0, blocks) - held
    return masses.scatter_(0, blocks, rest).clamp_min_(0.0), tops


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


class Routed(NamedTuple):
    """active: [B, N] bool. averaged: [B, N], the mass left to the tail, 0 where active. tops: [B,
    N] bool, where the block's largest element is exact on its own; none where active."""

    active: Tensor
    averaged: Tensor
    tops: Tensor


def route(saved: Saved, request: GradRequest, full_fraction: float) -> Routed:
    """The pairs to compute, the mass of all others, and the elements exact on their own.

    A block active for more than ``full_fraction`` of the tokens takes all of them. With
    ``tail_eps`` 0 (``tail="exact"``) every pair is active.
    """
    if request.tail_eps == 0:
        every_pair = torch.ones_like(saved.partial_lse, dtype=torch.bool)
        return Routed(every_pair, torch.zeros_like(saved.partial_lse), ~every_pair)
    bounds = thresholds(request.grad, request.scored, request.tail_eps)
    masses, tops = split_masses(saved, bounds)
    active = masses >= bounds
    active |= active.sum(1, keepdim=True) > full_fraction * active.shape[1]
    return Routed(active, masses.masked_fill_(active, 0.0), tops.logical_and_(~active))


def routing_stats(routed: Routed, scored: Tensor) -> Tensor:
    """[4]: active fraction; averaged mass, mean and max; 1 if dense; all of scored tokens."""
    active, averaged, _ = routed
    count = scored.sum().clamp_min(1)
    fraction = (active & scored).sum() / (count * max(len(active), 1))
    mass = torch.where(scored, averaged.sum(0), 0.0)
    top = mass.max() if mass.numel() else mass.sum()
    dense = (active | ~scored).all()
    return torch.stack([fraction.to(mass.dtype), mass.sum() / count, top, dense.to(mass.dtype)])


def target_grads(
    call: HeadCall,
    grad: Tensor,
    logps: Tensor,
    targets: Tensor,
    entropy: EntropyGrad | None = None,
) -> Tensor:
    """Gradients ``g (1 - p)`` [N] of the targets' logits before the softcap.

    ``1 - p`` is computed as such, so no digits cancel where p is close to 1.
    """
    grads = grad * -torch.expm1(logps)
    if entropy is not None:
        grads -= entropy.grad * torch.exp(logps) * (logps + entropy.values)
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
