"""Backward of the torch head: only the (token, block) pairs that routing keeps are recomputed.

Shapes: N tokens, H hidden, V vocabulary, B blocks of ``BLOCK`` vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .routing import BLOCK, Routed, num_blocks
from .torch_head import COLUMNS, ROWS, Head

FULL_FRACTION = 0.75
"""A block active for more of the tokens than this takes all of them, without gathering."""


class Saved(NamedTuple):
    """What forward kept. targets, logps, lse: [N]. partial_lse: [B, N]. profile: [V] or empty."""

    targets: Tensor
    logps: Tensor
    lse: Tensor
    partial_lse: Tensor
    profile: Tensor


class Gradients(NamedTuple):
    """Of hidden [N, H], weight [V, H] and bias [V]; None for those not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Span:
    """Vocabulary rows [start, stop) needed by the same tokens.

    rows: groups of tokens, one product each: slices, or indices; empty where none is active.
    """

    start: int
    stop: int
    rows: list[slice] | list[Tensor]


def spans(active: Tensor, vocabulary: int) -> Iterator[Span]:
    """Cut the vocabulary into runs of full or of empty blocks, and single blocks in between."""
    tokens = active.shape[1]
    everyone = [slice(row, row + ROWS) for row in range(0, tokens, ROWS)]
    counts = active.sum(1).tolist()
    block = 0
    while block < len(counts):
        first, count = block, counts[block]
        block += 1
        if count in (0, tokens):
            limit = min(first + COLUMNS // BLOCK, len(counts))
            while block < limit and counts[block] == count:
                block += 1
            rows = everyone if count else []
        else:
            rows = list(active[first].nonzero()[:, 0].split(ROWS))
        yield Span(first * BLOCK, min(block * BLOCK, vocabulary), rows)


class Backward:
    """One backward pass: what every span reads, and the gradients it adds to.

    Args:
        grad: [N] of the log-probs, 0 where the target is ignored.
        needs: whether hidden, weight and bias want a gradient.
    """

    def __init__(
        self, head: Head, saved: Saved, grad: Tensor, needs: tuple[bool, bool, bool]
    ) -> None:
        self.head, self.saved = head, saved
        self.grad = grad * head.logit_scale
        self.hidden = head.operand(head.hidden)
        self.own = self.grad * -torch.expm1(saved.logps)
        if head.softcap is not None:
            self.own = self.own * head.softcap_slope(saved.logps + saved.lse)
        blocks = saved.targets // BLOCK
        self.by_target = torch.argsort(blocks, stable=True)
        counts = torch.bincount(blocks, minlength=num_blocks(len(head.weight)))
        self.target_bounds = [0, *counts.cumsum(0).tolist()]

        self.d_hidden = grad.new_zeros(head.hidden.shape) if needs[0] else None
        self.d_weight = torch.empty_like(head.weight) if needs[1] else None
        self.d_bias = grad.new_zeros(len(head.weight)) if needs[2] else None
        self.in_place = head.weight.dtype == grad.dtype
        shape = (COLUMNS, head.hidden.shape[1])
        self.scratch = None if self.in_place or not needs[1] else grad.new_empty(shape)
        self.pull: Tensor | None = None

    def run(self, routed: Routed) -> Gradients:
        if self.saved.profile.numel() and not bool(routed.active.all()):
            self._tail(routed.averaged * self.grad)
        for span in spans(routed.active, len(self.head.weight)):
            self._span(span)
        d_hidden, d_bias, bias = self.d_hidden, self.d_bias, self.head.bias
        return Gradients(
            None if d_hidden is None else d_hidden.to(self.head.hidden.dtype),
            self.d_weight,
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )

    def _tail(self, weighted: Tensor) -> None:
        """The inactive pairs: all of dH and of db, and ``pull`` for the rows of dW.

        Args:
            weighted: [B, N], each inactive pair's mass times its token's gradient.
        """
        profile = self.saved.profile
        if self.d_hidden is not None:
            self.d_hidden.addmm_(weighted.T, profile_means(self.head, profile), alpha=-1)
        if self.d_bias is not None:
            per_row = weighted.sum(1).repeat_interleave(BLOCK)[: len(profile)]
            self.d_bias.addcmul_(profile, per_row, value=-1)
        if self.d_weight is not None:
            self.pull = (weighted @ self.hidden.to(weighted.dtype)).neg_()

    def _span(self, span: Span) -> None:
        """The products and targets of one span, and its rows of dW from first to last."""
        weight = self.head.operand(self.head.weight[span.start : span.stop])
        d_rows = self._first_rows(span) if self.d_weight is not None else None
        for rows in span.rows:
            self._products(rows, weight, span.start, d_rows)
        first, last = span.start // BLOCK, num_blocks(span.stop)
        targeted = self.by_target[self.target_bounds[first] : self.target_bounds[last]]
        if len(targeted):
            self._targets(targeted, weight, span.start, d_rows)
        if self.d_weight is not None and d_rows is not None and not self.in_place:
            self.d_weight[span.start : span.stop] = d_rows

    def _first_rows(self, span: Span) -> Tensor:
        """The span's rows of dW [v, H] as the tail leaves them: minus profile times pull."""
        rows = span.stop - span.start
        assert self.d_weight is not None
        source = self.d_weight[span.start :] if self.scratch is None else self.scratch
        d_rows = source[:rows]
        if self.pull is None:
            return d_rows.zero_()
        profile = self.saved.profile[span.start : span.stop]
        pull = self.pull[span.start // BLOCK : num_blocks(span.stop)]
        if len(pull) == 1:
            return torch.mul(profile[:, None], pull, out=d_rows)
        whole = rows // BLOCK * BLOCK
        blocked = d_rows[:whole].view(-1, BLOCK, d_rows.shape[1])
        torch.mul(profile[:whole].view(-1, BLOCK, 1), pull[: len(blocked), None], out=blocked)
        torch.mul(profile[whole:, None], pull[-1:], out=d_rows[whole:])
        return d_rows

    def _products(
        self, rows: slice | Tensor, weight: Tensor, start: int, d_rows: Tensor | None
    ) -> None:
        """Recompute the logits of some tokens over some vocabulary rows; add to dH, dW, db."""
        head, hidden = self.head, self.hidden[rows]
        z = head.logits(hidden, weight, start)
        coefficients = self._logit_gradient(z, rows, start)
        if self.d_bias is not None:
            self.d_bias[start : start + len(weight)] += coefficients.sum(0)
        coefficients = coefficients.to(weight.dtype)
        if self.d_hidden is not None:
            if isinstance(rows, slice) and weight.dtype == self.d_hidden.dtype:
                self.d_hidden[rows].addmm_(coefficients, weight)
            elif isinstance(rows, slice):
                self.d_hidden[rows] += head.product(coefficients, weight)
            else:
                self.d_hidden.index_add_(0, rows, head.product(coefficients, weight))
        if d_rows is not None:
            if weight.dtype == d_rows.dtype:
                d_rows.addmm_(coefficients.T, hidden)
            else:
                d_rows += head.product(coefficients.T, hidden)

    def _logit_gradient(self, z: Tensor, rows: slice | Tensor, start: int) -> Tensor:
        """-g p times the softcap's slope, [n, v], over logits ``z``; 0 at the targets.

        The targets' own element is g (1 - p), which `_targets` adds from 1 - p as such: no
        cancellation where p is close to 1.
        """
        slope = None if self.head.softcap is None else self.head.softcap_slope(z)
        coefficients = z.sub_(self.saved.lse[rows, None]).exp_().mul_(-self.grad[rows, None])
        if slope is not None:
            coefficients *= slope
        first, last = start // BLOCK, num_blocks(start + z.shape[1])
        if self.target_bounds[first] < self.target_bounds[last]:
            column = self.saved.targets[rows, None] - start
            outside = (column < 0) | (column >= z.shape[1])
            column.clamp_(0, z.shape[1] - 1)
            coefficients.scatter_(1, column, coefficients.gather(1, column) * outside)
        return coefficients

    def _targets(self, rows: Tensor, weight: Tensor, start: int, d_rows: Tensor | None) -> None:
        """Add the targets' own elements for tokens ``rows`` [n], whose targets lie here."""
        local = self.saved.targets[rows] - start
        own = self.own[rows, None]
        if self.d_hidden is not None:
            self.d_hidden.index_add_(0, rows, own * weight[local])
        if d_rows is not None:
            d_rows.index_add_(0, local, own * self.hidden[rows])
        if self.d_bias is not None:
            self.d_bias.index_add_(0, local + start, own[:, 0])


def profile_means(head: Head, profile: Tensor) -> Tensor:
    """Each block's average weight row under its profile, [B, H]: one reading of the weight."""
    vocabulary, width = head.weight.shape
    means = profile.new_empty(num_blocks(vocabulary), width)
    for start in range(0, vocabulary, COLUMNS):
        weight = head.operand(head.weight[start : start + COLUMNS]).to(profile.dtype)
        inside = profile[start : start + len(weight)]
        missing = -len(weight) % BLOCK
        if missing:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, missing))
            inside = torch.nn.functional.pad(inside, (0, missing))
        blocks = slice(start // BLOCK, (start + len(weight)) // BLOCK)
        shape = (-1, BLOCK, width)
        means[blocks] = torch.bmm(inside.view(-1, 1, BLOCK), weight.view(shape))[:, 0]
    return means
