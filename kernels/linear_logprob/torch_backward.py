"""The head's backward in torch: recomputes only the (token, block) pairs that routing keeps.

Shapes: N tokens, H hidden, V vocabulary, B blocks of ``BLOCK`` vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .routing import (
    BLOCK,
    Routed,
    route,
    routing_stats,
    target_grads,
    top_columns,
    top_shares,
)
from .torch_forward import (
    COLUMNS,
    ROWS,
    add_product,
    logits,
    operand,
    product,
    profile_means,
    softcap_slope,
)
from .types import EntropyGrad, Gradients, GradRequest, HeadCall, Saved

FULL_FRACTION = 0.75
"""A block active for more of the tokens than this takes all of them, without gathering."""
_LOG_OF_NOTHING = -1e4
"""Of a probability that is 0 in every dtype; a column that a bias masks has -inf."""


def backward(call: HeadCall, saved: Saved, request: GradRequest) -> tuple[Gradients, Tensor]:
    """The gradients, and the routing's statistics [4]."""
    routed = route(saved, request, FULL_FRACTION)
    return Backward(call, saved, request).run(routed), routing_stats(routed, request.scored)


class Span(NamedTuple):
    """Consecutive vocabulary blocks [first, last) treated together.

    Either all of them are active for all tokens (``full``), or each for some tokens.
    """

    first: int
    last: int
    full: bool


def spans(full: list[bool]) -> Iterator[Span]:
    """Cut the blocks into runs of full and of other ones, of at most ``COLUMNS`` rows."""
    first = 0
    while first < len(full):
        last = first + 1
        while last < min(len(full), first + COLUMNS // BLOCK) and full[last] == full[first]:
            last += 1
        yield Span(first, last, full[first])
        first = last


class Piece(NamedTuple):
    """Up to ``ROWS`` active pairs of a span: tokens [n], and the blocks they belong to.

    blocks: [n], counted from the span's first. segments: (block, begin, end) of each run of pairs.
    """

    tokens: Tensor
    blocks: Tensor
    segments: list[tuple[int, int, int]]


def pieces(active: Tensor) -> Iterator[Piece]:
    """The pairs of ``active`` [b, N] in order of block, then token."""
    ends = active.sum(1).cumsum(0).tolist()
    blocks, tokens = active.nonzero(as_tuple=True)
    for start in range(0, len(tokens), ROWS):
        stop = min(start + ROWS, len(tokens))
        bounds = enumerate(pairwise([0, *ends]))
        cut = [(b, max(lo, start) - start, min(hi, stop) - start) for b, (lo, hi) in bounds]
        yield Piece(tokens[start:stop], blocks[start:stop], [s for s in cut if s[1] < s[2]])


class Entries(NamedTuple):
    """Elements of G that are exact on their own, by vocabulary row, then token: targets and tops.

    rows, tokens, grads: [E].
    """

    rows: Tensor
    tokens: Tensor
    grads: Tensor


def list_entries(
    call: HeadCall, saved: Saved, grad: Tensor, tops: Tensor, entropy: EntropyGrad | None
) -> Entries:
    """The targets' elements, and those of ``tops`` [B, N] bool, which need no product.

    Args:
        grad: [N] of the log-probs, times ``logit_scale``; that of ``entropy`` too.
    """
    targets = saved.targets
    blocks, tokens = tops.nonzero(as_tuple=True)
    packed, partial_lse = saved.tops[blocks, tokens], saved.partial_lse[blocks, tokens]
    shares = top_shares(packed).to(grad.dtype)
    grads = torch.exp(partial_lse - saved.lse[tokens]).mul_(shares).mul_(-grad[tokens])
    if call.softcap is not None:
        grads *= softcap_slope(partial_lse + shares.log(), call.softcap)
    entries = Entries(
        torch.cat([blocks * BLOCK + top_columns(packed), targets]),
        torch.cat([tokens, torch.arange(len(grad), device=grad.device)]),
        torch.cat([grads, target_grads(call, grad, saved.logps, targets.clamp_min(0), entropy)]),
    )
    elsewhere = int((targets < 0).sum())  # which come first, and have no row here
    order = torch.argsort(entries.rows, stable=True)[elsewhere:]
    return Entries(*(x[order] for x in entries))


def weighted_sums(table: Tensor, places: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Sums [n, H] of weighted rows of ``table``: the first ``counts[0]`` of ``places``, and so on.

    Nothing is gathered, and each sum has one order: deterministic on every device.
    """
    starts = counts.cumsum(0) - counts
    return embedding_bag(places, table, starts, mode="sum", per_sample_weights=weights)


class Backward:
    """One backward pass: what every span reads, and the gradients it adds to."""

    def __init__(self, call: HeadCall, saved: Saved, request: GradRequest) -> None:
        self.call, self.saved, grad = call, saved, request.grad
        self.grad = grad * call.logit_scale
        self.entropy = request.entropy and request.entropy.scaled(call.logit_scale)
        self.hidden = operand(call, call.hidden)

        width = call.hidden.shape[1]
        self.d_hidden = grad.new_zeros(call.hidden.shape) if request.hidden else None
        self.d_weight = call.weight.new_empty(call.weight.shape) if request.weight else None
        self.d_bias = grad.new_zeros(len(call.weight)) if request.bias else None
        self.in_place = call.weight.dtype == grad.dtype
        needs_scratch = request.weight and not self.in_place
        self.scratch = grad.new_empty(COLUMNS, width) if needs_scratch else None
        self.gathered = self.hidden.new_empty(ROWS, width)
        self.logits = grad.new_empty(ROWS * COLUMNS)
        self.added = grad.new_empty(ROWS if request.hidden else 0, width)
        self.tail_grad: Tensor | None = None

    def run(self, routed: Routed) -> Gradients:
        full = routed.active.all(1).tolist()
        entries = list_entries(self.call, self.saved, self.grad, routed.tops, self.entropy)
        counts = torch.bincount(entries.rows // BLOCK, minlength=len(full))
        bounds = [0, *counts.cumsum(0).tolist()]
        if self.saved.profile.numel() and not all(full):
            self._tail(routed.averaged * self.grad)
        for span in spans(full):
            inside = slice(bounds[span.first], bounds[span.last])
            mine = Entries(*(x[inside] for x in entries))
            self._span(span, routed.active[span.first : span.last], mine)
        d_hidden, d_bias, bias = self.d_hidden, self.d_bias, self.call.bias
        return Gradients(
            None if d_hidden is None else d_hidden.to(self.call.hidden.dtype),
            self.d_weight,
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )

    def _tail(self, weighted: Tensor) -> None:
        """The inactive pairs: all of dH and of db, and ``tail_grad`` [B, H] for the rows of dW.

        Args:
            weighted: [B, N], each inactive pair's mass times its token's gradient.
        """
        profile = self.saved.profile
        if self.d_hidden is not None:
            self.d_hidden.addmm_(weighted.T, profile_means(self.call, profile), alpha=-1)
        if self.d_bias is not None:
            per_row = weighted.sum(1).repeat_interleave(BLOCK)[: len(profile)]
            self.d_bias.addcmul_(profile, per_row, value=-1)
        if self.d_weight is not None:
            self.tail_grad = (weighted @ self.hidden.to(weighted.dtype)).neg_()

    def _span(self, span: Span, active: Tensor, entries: Entries) -> None:
        """The products and entries of one span, and its rows of dW from first to last."""
        start = span.first * BLOCK
        weight = operand(self.call, self.call.weight[start : span.last * BLOCK])
        d_rows = None if self.d_weight is None else self._first_rows(span, len(weight))
        if span.full:
            for row in range(0, len(self.hidden), ROWS):
                self._everyone(slice(row, row + ROWS), weight, start, d_rows)
        else:
            for piece in pieces(active):
                self._piece(piece, weight, start, d_rows)
        if len(entries.rows):
            self._entries(entries, weight, start, d_rows)
        if self.d_weight is not None and d_rows is not None and not self.in_place:
            self.d_weight[start : start + len(weight)] = d_rows

    def _first_rows(self, span: Span, rows: int) -> Tensor:
        """The span's rows of dW [v, H] as the tail leaves them: profile times ``tail_grad``."""
        assert self.d_weight is not None
        start = span.first * BLOCK
        d_rows = (self.d_weight[start:] if self.scratch is None else self.scratch)[:rows]
        if self.tail_grad is None or span.full:
            return d_rows.zero_()
        profile = self.saved.profile[start : start + rows]
        tail_grad = self.tail_grad[span.first : span.last]
        even = rows // BLOCK * BLOCK  # without the rows of a ragged last block
        blocked = d_rows[:even].view(-1, BLOCK, d_rows.shape[1])
        torch.mul(profile[:even].view(-1, BLOCK, 1), tail_grad[: len(blocked), None], out=blocked)
        torch.mul(profile[even:, None], tail_grad[-1:], out=d_rows[even:])
        return d_rows

    def _everyone(self, rows: slice, weight: Tensor, start: int, d_rows: Tensor | None) -> None:
        """Add to dH, dW, db what some tokens contribute over all of ``weight`` [v, H]."""
        call, hidden = self.call, self.hidden[rows]
        buffer = self.logits[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        z = logits(call, hidden, weight, start, buffer)
        self._logit_gradient(z, rows, start)
        coefficients = z.to(weight.dtype)
        if self.d_hidden is not None:
            add_product(self.d_hidden[rows], coefficients, weight)
        if d_rows is not None:
            add_product(d_rows, coefficients.T, hidden)
        if self.d_bias is not None:
            self.d_bias[start : start + len(weight)] += z.sum(0)

    def _piece(self, piece: Piece, weight: Tensor, start: int, d_rows: Tensor | None) -> None:
        """Add to dH, dW, db what some pairs contribute, each token gathered per block."""
        call, (tokens, blocks, segments) = self.call, piece
        hidden = torch.index_select(self.hidden, 0, tokens, out=self.gathered[: len(tokens)])
        z = self.logits[: len(tokens) * BLOCK].view(len(tokens), BLOCK)
        cut = [(slice(BLOCK * b, BLOCK * b + BLOCK), slice(lo, hi)) for b, lo, hi in segments]
        for columns, rows in cut:
            part = weight[columns]
            logits(call, hidden[rows], part, start + columns.start, z[rows, : len(part)])
        self._logit_gradient(z, tokens, start + BLOCK * blocks)
        coefficients = z.to(weight.dtype)
        for columns, rows in cut:
            part = weight[columns]
            mine = coefficients[rows, : len(part)]
            if self.d_hidden is not None:
                product(mine, part, self.added[rows])
            if d_rows is not None:
                add_product(d_rows[columns], mine.T, hidden[rows])
            if self.d_bias is not None:
                first = start + columns.start
                self.d_bias[first : first + len(part)] += z[rows, : len(part)].sum(0)
        if self.d_hidden is not None:
            self.d_hidden.index_add_(0, tokens, self.added[: len(tokens)])

    def _logit_gradient(self, z: Tensor, rows: slice | Tensor, start: int | Tensor) -> None:
        """Turn logits ``z`` [n, v] into -g p times the softcap's slope; 0 at the targets.

        With a gradient of the entropy, ``-p (g + g_entropy (log p + entropy))``. `_entries` adds
        the targets' elements, see `target_grads`.

        Args:
            start: the vocabulary row of the first column, of all or [n] of each.
        """
        softcap = self.call.softcap
        slope = None if softcap is None else softcap_slope(z, softcap)
        z.sub_(self.saved.lse[rows, None])
        coefficients = self.grad[rows, None]
        if self.entropy is not None:
            values, grad = (x[rows, None] for x in self.entropy)
            coefficients = (z.clamp(min=_LOG_OF_NOTHING) + values) * grad + coefficients
        z.exp_().mul_(coefficients.neg())
        if slope is not None:
            z *= slope
        column = (self.saved.targets[rows] - start)[:, None]
        outside = (column < 0) | (column >= z.shape[1])
        column.clamp_(0, z.shape[1] - 1)
        z.scatter_(1, column, z.gather(1, column) * outside)

    def _entries(self, entries: Entries, weight: Tensor, start: int, d_rows: Tensor | None) -> None:
        """Add to dH, dW, db the elements that are exact on their own and lie in ``weight``."""
        rows, tokens, grads = entries
        local = rows - start
        if d_rows is not None:
            counts = torch.bincount(local, minlength=len(weight))
            d_rows += weighted_sums(self.hidden.to(grads.dtype), tokens, grads, counts)
        if self.d_bias is not None:
            self.d_bias.index_add_(0, rows, grads)
        if self.d_hidden is not None:
            order = torch.argsort(tokens, stable=True)
            theirs, counts = torch.unique_consecutive(tokens[order], return_counts=True)
            table = weight.to(grads.dtype)
            added = weighted_sums(table, local[order], grads[order], counts)
            self.d_hidden.index_add_(0, theirs, added)
