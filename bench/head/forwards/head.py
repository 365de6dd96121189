"""The head with another forward: tail "mean", and the package's Triton backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from widemargin.kernels.linear_logprob import TAIL_EPS, HeadStats
from widemargin.kernels.linear_logprob.operators import plain_arithmetic
from widemargin.kernels.linear_logprob.tiles import Tile, Tiles
from widemargin.kernels.linear_logprob.triton_backward import backward
from widemargin.kernels.linear_logprob.triton_forward import Launch, forward_by
from widemargin.kernels.linear_logprob.types import GradRequest, HeadCall, Saved


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        launch: Launch,
        tile: Tile,
        backward_tiles: Tiles | None,
        stats: Tensor,
    ) -> Tensor:
        call = HeadCall(hidden, weight, None, 1.0, None, hidden.dtype)
        with plain_arithmetic(hidden):
            saved = forward_by(launch, tile, call, targets, keep=True, profile=True, tops=True)
        ctx.save_for_backward(hidden, weight, *saved)
        ctx.backward_tiles, ctx.stats = backward_tiles, stats
        return saved.logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *kept = ctx.saved_tensors
        call = HeadCall(hidden, weight, None, 1.0, None, hidden.dtype)
        saved = Saved(*kept)
        scored = torch.ones_like(saved.targets, dtype=torch.bool)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        request = GradRequest(grads[0], scored, TAIL_EPS, needs_hidden, needs_weight, False)
        with plain_arithmetic(hidden):
            gradients, stats = backward(call, saved, request, ctx.backward_tiles)
        ctx.stats.copy_(stats)
        return gradients.hidden, gradients.weight, *[None] * 5


def scored_by(
    launch: Launch,
    tile: Tile,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    backward_tiles: Tiles | None = None,
) -> tuple[Tensor, HeadStats]:
    """Log-probs [N] of targets in [0, V), differentiable, and what backward's routing did.

    Args:
        backward_tiles: in place of the chip's.
    """
    stats = hidden.new_full((4,), torch.nan, dtype=torch.float32)
    return _Head.apply(hidden, weight, targets, launch, tile, backward_tiles, stats), HeadStats(
        stats
    )
