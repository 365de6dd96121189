"""Plain definitions of the ops: short, obvious, any floating dtype (fp64 for checks).

Shapes: N tokens, H hidden, V vocabulary, P pairs. Tests and benchmarks import these; nothing
else defines the ops a second time.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The full logits ``softcap(logit_scale * (hidden @ weight.T + bias)) / temperature``, [N, V].

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V] or None.
        logit_scale: multiplies the biased product (Cohere's ``logit_scale``).
        softcap: ``c`` in ``c * tanh(z / c)`` (Gemma-2's ``final_logit_softcapping``).
    """
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of each target under the head, [N]; 0 where the target is -100."""
    logps = head_logits(hidden, weight, bias, logit_scale, softcap, temperature).log_softmax(-1)
    ignored = targets == IGNORE_INDEX
    picked = logps.gather(-1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    return picked.masked_fill(ignored, 0.0)


class TokenFacts(NamedTuple):
    """Of each token's distribution over the vocabulary, [N]; see `token_facts`."""

    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def token_facts(logits: Tensor, targets: Tensor) -> TokenFacts:
    """What `linear_logprob` returns on request, from logits [N, V]; 0 where the target is -100."""
    logps = logits.log_softmax(-1)
    ignored = targets == IGNORE_INDEX
    entropy = torch.special.entr(logps.exp()).sum(-1)
    found = (entropy, (2 * logps).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == targets)
    return TokenFacts(*(fact.masked_fill(ignored, 0) for fact in found))


def sequence_logps(token_logps: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [S] and lengths [S] of the sequences that ``cu_seqlens`` [S + 1] cuts out of [N]."""
    bounds = cu_seqlens.tolist()
    sequences = [token_logps[a:b] for a, b in pairwise(bounds)]
    sums = [sequence.sum() for sequence in sequences]
    return torch.stack(sums) if sums else token_logps[:0], cu_seqlens.diff()


def margin_loss(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    target_margins: Tensor,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of each pair [P] for P chosen sequences, then P rejected; empty ones have mean 0."""
    sums, lengths = sequence_logps(token_logps, cu_seqlens)
    pairs = len(target_margins)
    losses = []
    for i in range(pairs):
        chosen_mean = sums[i] / max(int(lengths[i]), 1)
        rejected_mean = sums[pairs + i] / max(int(lengths[pairs + i]), 1)
        x = beta * (chosen_mean - rejected_mean) - target_margins[i]
        if kind == "hinge":
            losses.append((1 - x).clamp(min=0))
        else:
            right, flipped = -F.logsigmoid(x), -F.logsigmoid(-x)
            losses.append((1 - label_smoothing) * right + label_smoothing * flipped)
    return torch.stack(losses) if losses else token_logps[:0]
