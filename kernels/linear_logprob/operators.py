"""The head's forward and backward as torch operators, which autograd joins.

``torch.compile`` takes each operator as one node.

Shapes: N tokens, H hidden, V vocabulary, B blocks of vocabulary rows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import expect
from ..namespace import operator
from ..reference import IGNORE_INDEX
from .routing import num_blocks
from .torch_backward import backward as torch_backward
from .torch_forward import forward as torch_forward
from .types import Asked, EntropyGrad, GradRequest, HeadCall, Saved


@operator("linear_logprob", mutates_args=())
def forward_op(
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
    asked: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, lse, partial_lse, profile, tops of `Saved`, and `Extras`.

    Without ``keep`` the last three of `Saved` are empty, and so are extras not ``asked`` for.
    """
    bias = None if bias is None else bias.contiguous()  # as the kernels read it
    call = HeadCall(hidden, weight, bias, logit_scale, softcap, compute_dtype)
    check_targets(targets, len(weight))
    ignored = targets == IGNORE_INDEX
    targets = targets.masked_fill(ignored, 0)
    kept: dict[str, Any] = {"keep": keep, "profile": keep and tail == "mean"}
    kept |= {"tops": keep and tail != "exact", "asked": Asked(*asked) if any(asked) else None}
    with plain_arithmetic(hidden):
        if backend == "triton":
            from .triton_forward import forward as triton_forward

            saved = triton_forward(call, targets, **kept)
        else:
            saved = torch_forward(call, targets, **kept)
    logps = saved.logps.masked_fill_(ignored, 0.0)
    new, extras = saved.lse.new_empty, saved.extras or (None,) * 4
    e, s, m, t = (new(0) if x is None else x.masked_fill_(ignored, 0) for x in extras)
    return logps, saved.lse, saved.partial_lse, saved.profile, saved.tops, e, s, m, t


@forward_op.register_fake
def _(hidden, weight, *rest):
    tail, _tail_eps, compute_dtype, _backend, keep, asked = rest[-6:]
    dtype = torch.promote_types(compute_dtype, torch.float32)
    rows, vocabulary = hidden.shape[0], weight.shape[0]

    def new(*shape):
        return hidden.new_empty(shape, dtype=dtype)

    blocks = num_blocks(vocabulary) if keep else 0
    return (
        new(rows),
        new(rows),
        new(blocks, rows),
        new(vocabulary if keep and tail == "mean" else 0),
        hidden.new_empty((blocks if tail != "exact" else 0, rows), dtype=torch.int32),
        *(new(rows if wanted else 0) for wanted in asked[:-1]),
        hidden.new_empty(rows, dtype=torch.bool) if asked[-1] else new(0),
    )


@operator("linear_logprob_backward", mutates_args=("stats",))
def backward_op(
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
    tops: Tensor,
    entropy: Tensor,
    entropy_grad: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    tail: str,
    tail_eps: float,
    compute_dtype: torch.dtype,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, dW and db; empty where ``needs`` (hidden, weight, bias) says so. Fills ``stats``."""
    bias = None if bias is None else bias.contiguous()  # as the kernels read it
    call = HeadCall(hidden, weight, bias, logit_scale, softcap, compute_dtype)
    scored = targets != IGNORE_INDEX
    saved = Saved(targets.masked_fill(~scored, 0), logps, lse, partial_lse, profile, tops)
    grad = torch.where(scored, grad.to(lse.dtype), 0.0)
    of_entropy = None
    if entropy_grad is not None:
        of_entropy = EntropyGrad(entropy, torch.where(scored, entropy_grad.to(lse.dtype), 0.0))
    tail_eps = 0.0 if tail == "exact" else tail_eps
    request = GradRequest(grad, scored, tail_eps, *needs, entropy=of_entropy)
    with plain_arithmetic(hidden):
        if backend == "triton":
            from .triton_backward import backward as triton_backward

            gradients, routing_stats = triton_backward(call, saved, request)
        else:
            gradients, routing_stats = torch_backward(call, saved, request)
    if stats is not None:
        stats.copy_(routing_stats)
    # Contiguous whatever the inputs' strides are, as the fake's are: compiled code relies on it.
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(0) if g is None else g.contiguous() for g in gradients
    )
    return d_hidden, d_weight, d_bias


@backward_op.register_fake
def _(grad, hidden, weight, targets, bias, *rest):
    inputs = zip((hidden, weight, bias), rest[-1], strict=True)
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in inputs)


def kept_of(output: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What backward reads of `forward_op`'s results: `Saved` and the entropy.

    Log-probs and entropy [N] are copies, since losses overwrite parts of theirs (``logps[~mask] =
    0``).
    """
    logps, *saved, entropy = output[:6]
    return logps.clone(), *saved, entropy.clone()


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, stats, *settings, _keep, asked = inputs
    differentiable = 6 if asked[0] else 5
    ctx.mark_non_differentiable(*output[1:5], *output[differentiable:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, bias, *kept_of(output))
    ctx.stats = stats  # written by backward, so not a saved tensor
    ctx.settings = settings


class OnlyOnce(torch.autograd.Function):
    """Marks a gradient as non-differentiable, so that double backward raises.

    torch's ``once_differentiable`` does not raise where the incoming gradient depends on the inputs
    in turn: it returns derivatives of zero.
    """

    @staticmethod
    def forward(ctx, gradient, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "linear_logprob: it has no second derivative; linear_logprob of kernels.reference has"
        )


def _backward(ctx, grad, _lse, _partial_lse, _profile, _tops, entropy_grad, *_):
    none = (None,) * 13
    if grad is None and entropy_grad is None:
        return none
    check_entropy_grad(entropy_grad, ctx.settings[2])
    grad = torch.zeros_like(entropy_grad) if grad is None else grad
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    hidden, weight, targets, bias, *kept = ctx.saved_tensors
    inputs = (hidden, weight, targets, bias)
    with torch.no_grad():
        gradients = backward_op(grad, *inputs, ctx.stats, *kept, entropy_grad, *ctx.settings, needs)
    if torch.is_grad_enabled():  # create_graph=True
        gradients = (OnlyOnce.apply(gradient, grad, *inputs) for gradient in gradients)
    d_hidden, d_weight, d_bias = (g if n else None for g, n in zip(gradients, needs, strict=True))
    return d_hidden, d_weight, None, d_bias, *none[4:]


def check_entropy_grad(entropy_grad: Tensor | None, tail: str) -> None:
    """Raise where the tail would not do: entropy's gradient has no mean over a block."""
    if entropy_grad is not None and tail != "exact":
        raise NotImplementedError(
            "linear_logprob: pass tail='exact' to train with the entropy, or detach it; "
            f"its gradient needs every pair, and tail={tail!r} computes some"
        )


forward_op.register_autograd(_backward, setup_context=_setup_context)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise ``ValueError`` for ids outside the vocabulary, on a CPU: a GPU would be waited for."""
    if targets.device.type != "cpu" or not len(targets):
        return
    outside = ((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= vocabulary)
    if bool(outside.any()):
        wrong = int(targets[outside][0])
        expect(False, "targets", f"ids in [0, {vocabulary}) or {IGNORE_INDEX}", wrong)


class _IeeeProducts:
    """A context in which fp32 products stay IEEE: no TF32 or bf16 in their place.

    torch keeps this setting for the process, so threads share it: the first one in sets it, the
    last one out restores what the first found.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [(x, x.fp32_precision) for x in _product_backends()]
                for backend, _ in self._before:
                    backend.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for backend, precision in self._before:
                    backend.fp32_precision = precision


def _product_backends() -> list[Any]:
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in backends if backend is not None]


ieee_products = _IeeeProducts()


@contextlib.contextmanager
def plain_arithmetic(hidden: Tensor) -> Iterator[None]:
    """No autocast, and `ieee_products`.

    Triton launches on the current device, which is that of ``hidden`` meanwhile.
    """
    device = torch.cuda.device_of(hidden)
    with ieee_products, device, torch.autocast(hidden.device.type, enabled=False):
        yield
