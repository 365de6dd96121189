"""Facts about each token's distribution from sums over vocabulary blocks, where a call asks.

A block's own entropy, ``-sum q log q`` of the distribution q inside it, joins the others by the
chain rule:

    entropy = sum_b mass_b (own_b - log mass_b)

Every term is positive, so no digits cancel. Shapes: N tokens, V vocabulary, B blocks of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import BLOCK, blocked
from .types import Asked, Extras, Saved

KEPT = {
    "entropy": ("entropy",),
    "log_sum_sq_probs": ("sq_probs",),
    "mean_logits": ("logits",),
    "is_top1": ("largest", "column"),
}
"""What of each block is kept for each of `Extras`: its own entropy, its sum of squared shares, the
sum of its logits, the largest of them, and the first column that has it."""


class BlockSums:
    """values: [K, B, N], those of `KEPT` that are asked for; a Triton forward writes them, or the
    methods, of the blocks and tokens ``where``. kept: each by its name."""

    def __init__(self, asked: Asked, like: Tensor) -> None:
        """Args: like: [B, N]."""
        names = [name for field, kept in KEPT.items() if getattr(asked, field) for name in kept]
        self.asked = asked
        self.values = like.new_empty(len(names), *like.shape)
        self.kept = dict(zip(names, self.values, strict=True))

    def add_logits(self, logits: Tensor, where: tuple[slice, slice]) -> None:
        """Args: logits: [n, v]."""
        if self.asked.mean_logits:
            self.kept["logits"][where] = blocked(logits).sum(-1).T
        if self.asked.is_top1:
            largest, column = blocked(logits, fill=-torch.inf).max(-1)
            self.kept["largest"][where] = largest.T
            self.kept["column"][where] = column.T.to(largest.dtype)

    def add_exponentials(self, inside: Tensor, sums: Tensor, where: tuple[slice, slice]) -> None:
        """Args: inside: [n, b, BLOCK], relative to each block's largest. sums: [n, b], theirs."""
        some = sums > 0
        if self.asked.entropy:
            logs = inside.log().clamp_min_(torch.finfo(sums.dtype).min)  # 0 log 0 is 0
            spread = (inside.unsqueeze(-2) @ logs.unsqueeze(-1))[..., 0, 0]
            own = sums.log() - spread / sums
            self.kept["entropy"][where] = torch.where(some, own, 0.0).T
        if self.asked.log_sum_sq_probs:
            squares = (torch.linalg.vector_norm(inside, dim=-1) / sums).square_()
            self.kept["sq_probs"][where] = torch.where(some, squares, 1.0).T

    def extras(self, saved: Saved, vocabulary: int) -> Extras:
        """Args: saved: with all of its ``partial_lse``."""
        asked, kept, found = self.asked, self.kept, {}
        log_masses = saved.partial_lse - saved.lse
        if asked.entropy:
            finite = log_masses.clamp_min(torch.finfo(log_masses.dtype).min)
            found["entropy"] = (finite.exp() * (kept["entropy"] - finite)).sum(0)
        if asked.log_sum_sq_probs:
            found["log_sum_sq_probs"] = (2 * log_masses + kept["sq_probs"].log()).logsumexp(0)
        if asked.mean_logits:
            found["mean_logits"] = kept["logits"].sum(0) / vocabulary
        if asked.is_top1:
            block = kept["largest"].argmax(0)
            column = kept["column"].gather(0, block[None])[0].long()
            found["is_top1"] = (block * BLOCK + column == saved.targets) & saved.lse.isfinite()
        return Extras(*(found.get(field) for field in Extras._fields))
