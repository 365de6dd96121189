"""Triton kernels of `sequence_logps` and `margin_loss`: one launch forward, one backward.

The formulas are those of `function.py`; with e the label smoothing, the slope of pair i is

    sigmoid: d loss_i / d x_i = -(1 - e) * sigmoid(-x_i) + e * sigmoid(x_i)
    hinge:   d loss_i / d x_i = -1 where x_i < 1, else 0

and a token of its chosen sequence gets ``grad_i * beta * slope_i / length``, one of its rejected
sequence minus that. Shapes: N tokens, P pairs. Forward runs one program per pair (per sequence for
the bare sums), backward one per sequence and one more that zeroes the padding. No atomics: one
program takes each sum in a fixed order, so results repeat bit for bit. All arithmetic is fp32.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# Tokens per step of a program's loop. A completion has tens to thousands of tokens; there is one
# load or store in flight per token and nothing to tune that a launch would not hide.
BLOCK: Any = 1024  # Any: to a type checker, constexpr is a class that 1024 is not of


@triton.jit
def _segment_sum(logps_ptr, begin, end, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    partial = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + offs
        partial += tl.load(logps_ptr + at, mask=at < end, other=0.0).to(tl.float32)
    return tl.sum(partial)


@triton.jit
def _divisor(begin, end):
    """The length of a sequence, or 1 for an empty one, whose sum is 0."""
    return tl.maximum(end - begin, 1).to(tl.float32)


@triton.jit
def _fill(out_ptr, value, begin, end, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    values = tl.full([BLOCK], 0.0, tl.float32) + value
    for start in range(begin, end, BLOCK):
        at = start + offs
        tl.store(out_ptr + at, values, mask=at < end)


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1], to fp32 precision.

    The hardware's logarithm is good to 2e-7 absolute, so that of 1 + u has no correct digit left
    once u is below that: losses of well separated pairs. This is 2 atanh(u / (2 + u)), whose
    series converges by a factor of 9 or more a term.
    """
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 / 13.0 + q * (1.0 / 15.0)
    series = 1.0 / 11.0 + q * series
    series = 1.0 / 9.0 + q * series
    series = 1.0 / 7.0 + q * series
    series = 1.0 / 5.0 + q * series
    series = 1.0 / 3.0 + q * series
    return 2.0 * s * (1.0 + q * series)


@triton.jit
def _sums_kernel(logps_ptr, cu_seqlens_ptr, sums_ptr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
    tl.store(sums_ptr + sequence, _segment_sum(logps_ptr, begin, end, BLOCK))


@triton.jit(do_not_specialize=["stride_grad", "tokens", "sequences"])
def _sums_backward_kernel(
    grad_ptr, stride_grad, cu_seqlens_ptr, d_logps_ptr, tokens, sequences, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    if sequence == sequences:
        _fill(d_logps_ptr, 0.0, begin, tokens, BLOCK)
    else:
        end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
        grad = tl.load(grad_ptr + sequence * stride_grad).to(tl.float32)
        _fill(d_logps_ptr, grad, begin, end, BLOCK)


@triton.jit(do_not_specialize=["pairs"])
def _loss_kernel(
    logps_ptr,
    cu_seqlens_ptr,
    margins_ptr,
    losses_ptr,
    slopes_ptr,
    beta,
    label_smoothing,
    pairs,
    HINGE: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    begin_w = tl.load(cu_seqlens_ptr + pair).to(tl.int64)
    end_w = tl.load(cu_seqlens_ptr + pair + 1).to(tl.int64)
    begin_l = tl.load(cu_seqlens_ptr + pairs + pair).to(tl.int64)
    end_l = tl.load(cu_seqlens_ptr + pairs + pair + 1).to(tl.int64)
    mean_w = _segment_sum(logps_ptr, begin_w, end_w, BLOCK) / _divisor(begin_w, end_w)
    mean_l = _segment_sum(logps_ptr, begin_l, end_l, BLOCK) / _divisor(begin_l, end_l)
    x = beta * (mean_w - mean_l) - tl.load(margins_ptr + pair).to(tl.float32)
    if HINGE:
        # Written so that NaN goes through, as it does in relu.
        satisfied = x >= 1.0
        loss = tl.where(satisfied, 0.0, 1.0 - x)
        slope = tl.where(satisfied, 0.0, -1.0)
    else:
        u = tl.exp(-tl.abs(x))
        near, far = 1.0 / (1.0 + u), u / (1.0 + u)  # sigmoid(|x|), sigmoid(-|x|)
        positive = x >= 0
        # Not tl.maximum(-x, 0), which would turn NaN into 0.
        loss = tl.where(positive, 0.0, -x) + _log1p(u)
        slope = -tl.where(positive, far, near)
        if SMOOTH:
            flipped = tl.where(x <= 0, 0.0, x) + _log1p(u)
            loss = (1.0 - label_smoothing) * loss + label_smoothing * flipped
            flipped_slope = tl.where(positive, near, far)
            slope = (1.0 - label_smoothing) * slope + label_smoothing * flipped_slope
    tl.store(losses_ptr + pair, loss)
    tl.store(slopes_ptr + pair, beta * slope)


@triton.jit(do_not_specialize=["stride_grad", "tokens", "pairs"])
def _loss_backward_kernel(
    grad_ptr,
    stride_grad,
    slopes_ptr,
    cu_seqlens_ptr,
    d_logps_ptr,
    tokens,
    pairs,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    if sequence == 2 * pairs:
        _fill(d_logps_ptr, 0.0, begin, tokens, BLOCK)
    else:
        end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
        pair = tl.where(sequence < pairs, sequence, sequence - pairs)
        sign = tl.where(sequence < pairs, 1.0, -1.0)
        grad = tl.load(grad_ptr + pair * stride_grad).to(tl.float32)
        coefficient = sign * grad * tl.load(slopes_ptr + pair) / _divisor(begin, end)
        _fill(d_logps_ptr, coefficient, begin, end, BLOCK)
