"""A row of tokens that several ranks share: its parts, and the exchanges around attention.

Rank r of n has the tokens r, r + n, r + 2n, ... of a row, filled up to as many on each rank. So the
ranks have equally many prompt and completion tokens, and the head as much work on each. Layers see
one token at a time, except attention. For attention an all-to-all exchange gives each rank all
tokens of some heads (DeepSpeed-Ulysses, arXiv 2309.14509). The registered function computes these
heads with the lengths of the row, and a second exchange takes each rank's tokens back.

Shapes: T tokens of a row, t = ceil(T / n) of a rank; N targets; h heads of D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .groups import Place


@dataclass(frozen=True)
class SharedRow:
    """A row of ``tokens`` tokens, as the rank at ``place`` sees it."""

    place: Place
    tokens: int

    def own(self, values: Tensor) -> Tensor:
        """This rank's [.., t] of [.., T]; zeros where the row is filled up."""
        filled = F.pad(values, (0, -self.tokens % self.place.size))
        return filled[..., self.place.rank :: self.place.size].contiguous()

    def own_places(self, positions: Tensor) -> Tensor:
        """Where in this rank's tokens its ``positions`` of the row are."""
        return positions // self.place.size

    def some_heads(self, values: Tensor) -> Tensor:
        """[1, h, t, D] of this rank's tokens -> [1, h / n, T, D]: all tokens of its heads.

        Fewer heads of keys or values than ranks are repeated, each for the queries that it serves.
        """
        size, heads = self.place.size, values.shape[1]
        values = values.repeat_interleave(math.lcm(heads, size) // heads, dim=1)
        parts = self.exchanged(values.unflatten(1, (size, -1)).movedim(1, 0))
        return parts.movedim(0, 3).flatten(2, 3)[:, :, : self.tokens]

    def own_tokens(self, values: Tensor) -> Tensor:
        """[1, T, h / n, D] of this rank's heads -> [1, t, h, D]: all heads of its tokens."""
        size = self.place.size
        filled = F.pad(values, (0, 0, 0, 0, 0, -self.tokens % size))
        parts = self.exchanged(filled.unflatten(1, (-1, size)).movedim(2, 0))
        return parts.movedim(0, 2).flatten(2, 3)

    def exchanged(self, parts: Tensor) -> Tensor:
        """Part i of ``parts`` [n, ..] goes to rank i of the group, and its part for us comes."""
        return _Exchange.apply(parts, self.place.group)  # pyright: ignore[reportReturnType]

    def joined(self, scores: Tensor, own_targets: Tensor, targets: int) -> Tensor:
        """This rank's ``scores`` [C, len(own_targets)] with those of the others: [C, N].

        Each rank goes on from the same numbers, so each has the complete gradient and takes that of
        its own targets. It takes it n times, since the gradients of all ranks will be averaged,
        though those of a group's ranks are parts of one sum.
        """
        return _Join.apply(scores, own_targets, targets, self.place)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    """An all-to-all exchange, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Exchange.apply(gradients[0], ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, own: Tensor, targets: int, place: Place) -> Tensor:
        ctx.save_for_backward(own)
        ctx.size = place.size
        everyone = scores.new_zeros(len(scores), targets).index_copy_(1, own, scores)
        dist.all_reduce(everyone, group=place.group)
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (own,) = ctx.saved_tensors
        return gradients[0].index_select(1, own) * ctx.size, None, None, None
