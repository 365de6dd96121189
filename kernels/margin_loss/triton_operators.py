"""Triton backend of `sequence_logps` and `margin_loss`: operators that launch the kernels.

torch.library's operators rather than an autograd.Function: torch.compile takes them as one node.
Saved for backward: cu_seqlens [2P + 1] and ``beta * slope`` [P]; nothing is summed a second time.
Shapes: N tokens, P pairs. Only `function.py` imports this module, once it has chosen Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..namespace import operator
from .triton_kernels import (
    BLOCK,
    _loss_backward_kernel,
    _loss_kernel,
    _sums_backward_kernel,
    _sums_kernel,
)


@operator("sequence_sums", mutates_args=())
def sequence_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Summed logps [S] in fp32."""
    sequences = len(cu_seqlens) - 1
    sums = token_logps.new_empty(sequences, dtype=torch.float32)
    if sequences:
        with torch.cuda.device_of(token_logps):
            _sums_kernel[(sequences,)](
                token_logps.contiguous(),
                cu_seqlens.contiguous(),
                sums,
                BLOCK=BLOCK,
            )
    return sums


@sequence_sums.register_fake
def _(token_logps, cu_seqlens):
    return token_logps.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.float32)


@operator("sequence_sums_backward", mutates_args=())
def _sequence_sums_backward(
    grad: Tensor, cu_seqlens: Tensor, tokens: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the logps, [N] in their dtype."""
    sequences = len(cu_seqlens) - 1
    d_logps = grad.new_empty(tokens, dtype=dtype)
    with torch.cuda.device_of(grad):
        _sums_backward_kernel[(sequences + 1,)](
            grad,
            grad.stride(0),
            cu_seqlens.contiguous(),
            d_logps,
            tokens,
            sequences,
            BLOCK=BLOCK,
        )
    return d_logps


@_sequence_sums_backward.register_fake
def _(grad, cu_seqlens, tokens, dtype):
    return grad.new_empty(tokens, dtype=dtype)


def _keep_for_sums(ctx, inputs, output) -> None:
    token_logps, cu_seqlens = inputs
    ctx.save_for_backward(cu_seqlens)
    ctx.tokens, ctx.dtype = token_logps.shape[0], token_logps.dtype


def _backward_of_sums(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    return _sequence_sums_backward(grad, cu_seqlens, ctx.tokens, ctx.dtype), None


def _keep_boundaries(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _second_backward_of_sums(ctx, grad):
    return sequence_sums(grad, *ctx.saved_tensors), None, None, None


sequence_sums.register_autograd(_backward_of_sums, setup_context=_keep_for_sums)
_sequence_sums_backward.register_autograd(_second_backward_of_sums, setup_context=_keep_boundaries)


@operator("margin_loss", mutates_args=())
def _loss_op(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    target_margins: Tensor,
    beta: float,
    hinge: bool,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """losses [P] and ``beta * slope`` [P], in fp32."""
    pairs = len(target_margins)
    losses = token_logps.new_empty(pairs, dtype=torch.float32)
    slopes = torch.empty_like(losses)
    flags: dict[str, Any] = {"HINGE": hinge, "SMOOTH": label_smoothing != 0.0}
    if pairs:
        with torch.cuda.device_of(token_logps):
            _loss_kernel[(pairs,)](
                token_logps.contiguous(),
                cu_seqlens.contiguous(),
                target_margins.contiguous(),
                losses,
                slopes,
                beta,
                label_smoothing,
                pairs,
                BLOCK=BLOCK,
                **flags,
            )
    return losses, slopes


@_loss_op.register_fake
def _(token_logps, cu_seqlens, target_margins, beta, hinge, label_smoothing):
    losses = token_logps.new_empty(target_margins.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


@operator("margin_loss_backward", mutates_args=())
def _loss_backward_op(
    grad: Tensor, slopes: Tensor, cu_seqlens: Tensor, tokens: int, dtype: torch.dtype
) -> Tensor:
    """The gradient of the logps, [N] in their dtype."""
    pairs = len(slopes)
    d_logps = grad.new_empty(tokens, dtype=dtype)
    with torch.cuda.device_of(grad):
        _loss_backward_kernel[(2 * pairs + 1,)](
            grad,
            grad.stride(0),  # 0 for the expanded gradient of a sum or mean
            slopes,
            cu_seqlens.contiguous(),
            d_logps,
            tokens,
            pairs,
            BLOCK=BLOCK,
        )
    return d_logps


@_loss_backward_op.register_fake
def _(grad, slopes, cu_seqlens, tokens, dtype):
    return grad.new_empty(tokens, dtype=dtype)


def _keep_for_loss(ctx, inputs, output) -> None:
    token_logps, cu_seqlens, *_ = inputs
    _, slopes = output  # differentiable for autograd, so that a second derivative is noticed
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slopes, cu_seqlens)
    ctx.tokens, ctx.dtype = token_logps.shape[0], token_logps.dtype


def _backward_of_loss(ctx, grad, _):
    none = (None,) * 5
    if grad is None:
        return None, *none
    slopes, cu_seqlens = ctx.saved_tensors
    return _loss_backward_op(grad, slopes, cu_seqlens, ctx.tokens, ctx.dtype), *none


def _no_second_backward(ctx, grad):
    raise NotImplementedError(
        "margin_loss: it has no second derivative; margin_loss of kernels.reference has"
    )


_loss_op.register_autograd(_backward_of_loss, setup_context=_keep_for_loss)
_loss_backward_op.register_autograd(_no_second_backward)


def margin_losses(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    target_margins: Tensor,
    beta: float,
    kind: str,
    label_smoothing: float,
) -> Tensor:
    """The losses [P]; arguments as in `function.margin_loss`, which has checked them."""
    return _loss_op(
        token_logps, cu_seqlens, target_margins.detach(), beta, kind == "hinge", label_smoothing
    )[0]
