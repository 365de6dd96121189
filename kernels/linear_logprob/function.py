"""Log-probabilities of chosen tokens straight from hidden states, without logits.

Forward, one pass over the head's weight, tile by tile:

    z = softcap(logit_scale * (hidden @ weight.T + bias))            never stored
    partial_lse[b, i] = logsumexp of z[i] over vocabulary block b
    lse[i] = logsumexp_b partial_lse[b, i];  logp[i] = z[i, target_i] - lse[i]

Backward recomputes only where the softmax puts mass. ``exp(partial_lse[b, i] - lse[i])`` is the
exact probability of block b for token i, and real models put nearly all of it on a few blocks:

    active pairs    G = -g p, recomputed in fp32; dW += G^T hidden, dH += G weight
    the target      g (1 - p) on its own, exact, wherever it lies
    the tail        each inactive pair's exact mass, spread over the block's rows by ``profile``,
                    the batch's average distribution inside the block (``tail="mean"``)

Shapes: N tokens, H hidden, V vocabulary, B = ceil(V / 128) blocks. Saved for backward: the inputs
(the original weight, never a cast copy), logp, lse [N], partial_lse [B, N], profile [V].
Source: Cut Cross-Entropy (arXiv 2411.09009) for the idea of skipping negligible blocks; the
routing, the exact target and the averaged tail are this project's (bench/ measures them).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..checks import check_tensors
from ..reference import IGNORE_INDEX
from . import torch_backward as torch_head_backward
from . import torch_forward as torch_head
from .inputs import (
    TAIL_EPS,
    Backend,
    Tail,
    check_targets,
    choose_backend,
    compute_dtype_of,
    refuse_forward_mode,
    validate,
)
from .routing import num_blocks
from .torch_backward import Saved, Wanted
from .torch_forward import Head, ieee_products


class HeadStats:
    """What routing did, as device scalars; NaN until backward has run.

    active_fraction: pairs (token, vocabulary block) recomputed, of all. averaged_mass_mean,
    averaged_mass_max: probability per token left to the tail. dense: 1 if every pair was computed.
    All of scored tokens (no target of -100).
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def active_fraction(self) -> Tensor:
        return self.values[0]

    @property
    def averaged_mass_mean(self) -> Tensor:
        return self.values[1]

    @property
    def averaged_mass_max(self) -> Tensor:
        return self.values[2]

    @property
    def dense(self) -> Tensor:
        return self.values[3]


@torch.library.custom_op("widemargin::linear_logprob", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    tail: str,
    tail_eps: float,
    compute_dtype: torch.dtype,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps [N], lse [N], partial_lse [B, N], profile [V]; without ``keep`` the last two empty."""
    head = Head(hidden, weight, bias, logit_scale, softcap, compute_dtype)
    check_targets(targets, len(weight))
    ignored = targets == IGNORE_INDEX
    targets = targets.masked_fill(ignored, 0)
    forward = torch_head.forward
    if backend == "triton":
        from .triton_forward import forward
    with (
        torch.cuda.device_of(hidden),  # Triton launches on the current device
        torch.autocast(hidden.device.type, enabled=False),
        ieee_products(),
    ):
        logps, lse, partial_lse, profile = forward(
            head, targets, keep=keep, profile=keep and tail == "mean"
        )
    return logps.masked_fill_(ignored, 0.0), lse, partial_lse, profile


@_forward_op.register_fake
def _(hidden, weight, *rest):
    tail, _tail_eps, compute_dtype, _backend, keep = rest[-5:]
    dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    rows, vocabulary = len(hidden), len(weight)

    def new(*shape):
        return hidden.new_empty(shape, dtype=dtype)

    blocks = num_blocks(vocabulary) if keep else 0
    return (
        new(rows),
        new(rows),
        new(blocks, rows),
        new(vocabulary if keep and tail == "mean" else 0),
    )


@torch.library.custom_op("widemargin::linear_logprob_backward", mutates_args=("stats",))
def _backward_op(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    logps: Tensor,
    lse: Tensor,
    partial_lse: Tensor,
    profile: Tensor,
    logit_scale: float,
    softcap: float | None,
    tail: str,
    tail_eps: float,
    compute_dtype: torch.dtype,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, dW and db; empty where ``needs`` (hidden, weight, bias) says so. Fills ``stats``."""
    head = Head(hidden, weight, bias, logit_scale, softcap, compute_dtype)
    scored = targets != IGNORE_INDEX
    targets = targets.masked_fill(~scored, 0)
    grad = torch.where(scored, grad.to(lse.dtype), 0.0)
    saved = Saved(targets, logps, lse, partial_lse, profile)
    backward = torch_head_backward.backward
    if backend == "triton":
        from .triton_backward import backward
    with (
        torch.cuda.device_of(hidden),  # Triton launches on the current device
        torch.autocast(hidden.device.type, enabled=False),
        ieee_products(),
    ):
        eps = 0.0 if tail == "exact" else tail_eps
        wanted = Wanted(grad, scored, eps, needs[0], needs[1], needs[2])
        gradients, routing = backward(head, saved, wanted)
    if stats is not None:
        stats.copy_(routing)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return d_hidden, d_weight, d_bias


@_backward_op.register_fake
def _(grad, hidden, weight, targets, bias, *rest):
    wanted = zip((hidden, weight, bias), rest[-1], strict=True)
    return tuple(torch.empty_like(x) if need else hidden.new_empty(0) for x, need in wanted)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, stats, *settings, _keep = inputs
    logps, lse, partial_lse, profile = output
    ctx.mark_non_differentiable(lse, partial_lse, profile)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, bias, logps, lse, partial_lse, profile)
    ctx.stats = stats  # written by backward, so not a saved tensor
    ctx.settings = settings


class _OnlyOnce(torch.autograd.Function):
    """A gradient that depends on ``inputs``, by which it cannot be differentiated in turn.

    torch's ``once_differentiable`` would return a constant, and so derivatives of zero, where the
    gradient that came in is one itself.
    """

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "linear_logprob: it has no second derivative; linear_logprob of kernels.reference has"
        )


def _backward(ctx, grad, *_):
    none = (None,) * 12
    if grad is None:
        return none
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    *inputs, logps, lse, partial_lse, profile = ctx.saved_tensors
    saved = (logps, lse, partial_lse, profile)
    with torch.no_grad():
        found = _backward_op(grad, *inputs, ctx.stats, *saved, *ctx.settings, needs)
    if torch.is_grad_enabled():  # create_graph=True
        found = (_OnlyOnce.apply(gradient, grad, *inputs) for gradient in found)
    d_hidden, d_weight, d_bias = (g if n else None for g, n in zip(found, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, *none[4:]


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    tail: Tail = ...,
    tail_eps: float = ...,
    backend: Backend = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    tail: Tail = ...,
    tail_eps: float = ...,
    backend: Backend = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, HeadStats]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tail: Tail = "mean",
    tail_eps: float = TAIL_EPS,
    backend: Backend = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, HeadStats]:
    """``log softmax(softcap(logit_scale * (hidden @ weight.T + bias)))[targets]``, without logits.

    Differentiable in hidden, weight and bias; frozen ones cost nothing. Under autocast, products
    take inputs rounded to the autocast dtype, as `F.linear` would; accumulation is always fp32.

    Args:
        hidden: [N, H], fp32, bf16 or fp16; fp64 in the torch backend.
        weight: [V, H], hidden's dtype (any under autocast).
        targets: [N] int64 in [0, V), or -100: log-prob 0 and no gradient there. Such a position
            still costs forward, so select positions first. Ranges are checked on a CPU only: a GPU
            would be waited for; check where the data is made.
        bias: [V] or None.
        logit_scale: multiplies the logits, bias included.
        softcap: ``c`` in ``c * tanh(z / c)``; None for none.
        tail: what happens to (token, 128-row vocabulary block) pairs of negligible mass in
            backward. "mean" spreads their exact mass over the block's rows by the batch's average
            distribution there, "drop" ignores it, "exact" computes every pair.
        tail_eps: mass from which a pair is computed, weighted by its token's share of the
            gradient: ``|g_i| * mass >= tail_eps * mean|g|``. Probability in (0, 1).
        backend: "triton", "torch", or "auto": the fastest that takes these inputs.
        return_stats: also return `HeadStats`, which backward fills.

    Returns:
        [N] log-probs in fp32 (fp64 for fp64 inputs); with ``return_stats`` a pair with HeadStats.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit.
    """
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    if bias is not None:
        check_tensors(bias=bias)
    validate(hidden, weight, targets, bias, logit_scale, softcap, tail, tail_eps)
    compute_dtype = compute_dtype_of(hidden, weight)
    chosen = choose_backend(backend, hidden, compute_dtype)
    inputs = (hidden, weight, bias)
    refuse_forward_mode(*inputs)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    stats = hidden.new_full((4,), torch.nan, dtype=dtype) if return_stats else None
    settings = (logit_scale, softcap, tail, tail_eps, compute_dtype, chosen, keep)
    logps = _forward_op(hidden, weight, targets, bias, stats, *settings)[0]
    return logps if stats is None else (logps, HeadStats(stats))
