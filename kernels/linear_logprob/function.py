"""Log-probabilities of chosen tokens straight from hidden states, without logits.

Forward, one pass over the head's weight, tile by tile:

    z = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature    never stored
    partial_lse[b, i] = logsumexp of z[i] over vocabulary block b
    lse[i] = logsumexp_b partial_lse[b, i];  logp[i] = z[i, target_i] - lse[i]

Backward recomputes only where the softmax puts mass. ``exp(partial_lse[b, i] - lse[i])`` is the
exact probability of block b for token i, and real models put nearly all of it on a few blocks:

    active pairs    G = -g p, recomputed in fp32; dW += G^T hidden, dH += G weight
    the target      g (1 - p), exact, wherever it lies
    the tail        each inactive pair's exact mass, spread over the block's rows by ``profile``,
                    the batch's average distribution inside the block (``tail="mean"``)

Shapes: N tokens, H hidden, V vocabulary, B = ceil(V / 128) blocks. Saved for backward: the inputs
(the original weight, never a cast copy), logp, lse [N], partial_lse [B, N], profile [V], and tops
[B, N]: each block's largest element and the share of the block's mass that it has.
Source: Cut Cross-Entropy (arXiv 2411.09009) for the idea of skipping negligible blocks; the
routing, the exact target and the averaged tail are this project's (bench/ measures them).
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checks import (
    Backend,
    check_tensors,
    choose_backend,
    expect,
    is_number,
    refuse_transforms,
)
from .operators import forward_op
from .types import TAIL_EPS, TAILS, HeadStats, Tail

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
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
    temperature: float = ...,
    tail: Tail = ...,
    tail_eps: float = ...,
    backend: Backend = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, HeadStats]: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    tail: Tail = ...,
    tail_eps: float = ...,
    backend: Backend = ...,
    return_stats: bool = ...,
    return_entropy: bool = ...,
    return_log_sum_sq_probs: bool = ...,
    return_mean_logits: bool = ...,
    return_is_top1: bool = ...,
) -> Any: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    tail: Tail = "mean",
    tail_eps: float = TAIL_EPS,
    backend: Backend = "auto",
    return_stats: bool = False,
    return_entropy: bool = False,
    return_log_sum_sq_probs: bool = False,
    return_mean_logits: bool = False,
    return_is_top1: bool = False,
) -> Tensor | tuple[Any, ...]:
    """``log softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature)[targets]``.

    Differentiable in hidden, weight and bias; frozen ones cost nothing. Under autocast, products
    take inputs rounded to the autocast dtype, as `F.linear` would; accumulation is always fp32.

    Args:
        hidden: [N, H], fp32, bf16 or fp16; fp64 in the torch backend.
        weight: [V, H], hidden's dtype (any under autocast).
        targets: [N] int64 in [0, V), or -100: log-prob 0 and no gradient there. Such a position
            costs forward, so select positions first. A GPU does not check the range.
        bias: [V] or None. logit_scale: multiplies the logits, bias included.
        softcap: ``c`` in ``c * tanh(z / c)``; None for none.
        tail: what (token, 128-row vocabulary block) pairs of negligible mass become in backward.
            "mean" spreads their exact mass over the block's rows by the batch's average
            distribution there, "drop" ignores it, "exact" computes every pair.
        tail_eps: mass from which a pair is computed, in (0, 1), weighted by its token's share of
            the gradient: ``|g_i| * mass >= tail_eps * mean|g|``; see ``TRAINING_TAIL_EPS``.
        backend: "triton", "torch", or "auto": the fastest that takes these inputs.
        return_stats: also return `HeadStats`, which backward fills.
        return_entropy and so on: also return this one of `Extras`, [N]. The entropy's gradient
            needs ``tail="exact"``; with another tail, detach it or backward raises.

    Returns:
        [N] log-probs in fp32 (fp64 for fp64 inputs); with one or more ``return_...`` a tuple of
        the log-probs and these, in the order of the arguments.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit.
    """
    check_inputs(hidden, weight, targets, bias)
    check_settings(logit_scale, softcap, temperature, tail, tail_eps)
    refuse_transforms("linear_logprob", hidden, weight, bias)
    dtype = compute_dtype(hidden)
    stats = _no_stats(hidden, dtype) if return_stats else None
    scales = at_temperature(temperature, logit_scale, softcap)
    settings = (*scales, tail, tail_eps, dtype, choose_backend(backend, hidden, dtype))
    asked = [return_entropy, return_log_sum_sq_probs, return_mean_logits, return_is_top1]
    keep = needs_backward(hidden, weight, bias)
    found = forward_op(hidden, weight, targets, bias, stats, *settings, keep, asked)
    extras = [x for x, wanted in zip(found[-4:], asked, strict=True) if wanted]
    answers = [found[0], *([] if stats is None else [HeadStats(stats)]), *extras]
    return answers[0] if len(answers) == 1 else tuple(answers)


def at_temperature(
    temperature: float, logit_scale: float, softcap: float | None
) -> tuple[float, float | None]:
    """Scale and softcap of ``c tanh(s y / c) / T``, which is ``(c / T) tanh((s / T) y / (c / T))``.

    So a temperature costs nothing.
    """
    return logit_scale / temperature, None if softcap is None else softcap / temperature


def _no_stats(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """For `HeadStats`, which backward fills."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "return_stats: leave it out under torch.compile, whose graphs have no result that "
            "backward fills, or call linear_logprob in a function under torch.compiler.disable"
        )
    return hidden.new_full((4,), torch.nan, dtype=torch.promote_types(dtype, torch.float32))


def needs_backward(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype inputs are rounded to before products: autocast's, or their own."""
    if _autocast(hidden) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _autocast(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raise ``ValueError`` for the first tensor of the wrong shape, dtype or device."""
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    if bias is not None:
        check_tensors(bias=bias)
    expect(hidden.dim() == 2, "hidden", "[N, H]; flatten batch and sequence", list(hidden.shape))
    width = hidden.shape[1]
    fits = weight.dim() == 2 and weight.shape[1] == width
    expect(fits, "weight", lambda: f"[V, {width}]", list(weight.shape))
    whole = (
        "a plain tensor (under FSDP2 call inside the lm_head module's forward, as patch_head does, "
        "or give weight.full_tensor(); under tensor parallelism vocab_parallel_linear_logprob)"
    )
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        expect(not hasattr(tensor, "full_tensor"), name, whole, type(tensor))
    gathered = (
        "at least one vocabulary row (under ZeRO-3 or FSDP, call inside the lm_head module's "
        "forward, where it is gathered)"
    )
    expect(weight.shape[0] > 0, "weight", gathered, list(weight.shape))
    matches = targets.shape == hidden.shape[:1]
    expect(matches, "targets", lambda: f"[{hidden.shape[0]}]", list(targets.shape))
    expect(targets.dtype == torch.int64, "targets", "int64 token ids", targets.dtype)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        expect(tensor.dtype in _DTYPES, name, "fp32, bf16, fp16 or fp64", tensor.dtype)
    same = f"hidden's dtype {hidden.dtype}; cast one of them or use autocast"
    expect(weight.dtype == hidden.dtype or _autocast(hidden), "weight", same, weight.dtype)
    if bias is not None:
        matches = bias.shape == weight.shape[:1]
        expect(matches, "bias", lambda: f"[{weight.shape[0]}]", list(bias.shape))
        expect(bias.is_floating_point(), "bias", "a floating tensor", bias.dtype)
    devices = {x.device for x in (hidden, weight, targets, bias) if x is not None}
    expect(len(devices) == 1, "devices", "all inputs on one device", sorted(map(str, devices)))


def check_settings(
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    tail: str = "exact",
    tail_eps: float = TAIL_EPS,
) -> None:
    """Raise ``ValueError`` for the first setting that is out of its range."""
    scale = "a finite number (to learn one, multiply hidden by it)"
    expect(is_number(logit_scale), "logit_scale", scale, logit_scale)
    positive = softcap is None or (is_number(softcap) and softcap > 0)
    expect(positive, "softcap", "a positive number or None", softcap)
    hot = is_number(temperature) and temperature > 0
    expect(hot, "temperature", "a number above 0", temperature)
    expect(tail in TAILS, "tail", f"one of {', '.join(TAILS)}", tail)
    fits = is_number(tail_eps) and 0 < tail_eps < 1
    expect(fits, "tail_eps", "a probability in (0, 1)", tail_eps)
