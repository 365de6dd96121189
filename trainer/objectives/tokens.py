"""What a few settings need of single tokens; the others read sums and means alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.margin_loss.function import sequence_logps
from .terms import by_edges


def length_weighted(token_logps: Tensor, cu_seqlens: Tensor, alpha: float) -> Tensor:
    """``token_logps`` [N] with those past the length of a pair's shorter answer times ``alpha``.

    LD-DPO, arXiv 2409.06411. Tokens past the last sequence are padding, and stay.

    Args:
        cu_seqlens: [2P + 1], P chosen sequences and then P rejected ones.
    """
    lengths = cu_seqlens.diff()
    if not len(lengths):
        return token_logps
    chosen, rejected = lengths.chunk(2)
    ends = cu_seqlens[:-1] + torch.minimum(chosen, rejected).repeat(2)
    tokens = torch.arange(len(token_logps), device=token_logps.device)
    sequence = torch.bucketize(tokens, cu_seqlens[1:], right=True).clamp(max=len(lengths) - 1)
    return torch.where(tokens < ends[sequence], token_logps, alpha * token_logps)


@torch.no_grad()
def pair_weights(
    token_logps: Tensor, log_sum_squares: Tensor, cu_seqlens: Tensor, edges: Tensor | None = None
) -> Tensor:
    """[P], in [0, ...]: how likely the policy is to write both answers of a pair.

    WPO, arXiv 2406.11827, eq. 2: the product over both answers of their probability per token,
    each token's measured against the policy's own sampling, ``log_sum_squares`` [N].
    """
    sums, lengths = sequence_logps(token_logps.detach() - log_sum_squares, cu_seqlens)
    chosen, rejected = by_edges(sums / lengths.clamp(min=1), edges).chunk(2)
    return torch.exp(chosen + rejected)
