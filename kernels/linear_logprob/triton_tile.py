"""What the head's Triton kernels share: a tile of logits and its statistics.

Sizes that follow from the number of tokens are not specialised on: they differ from batch to batch,
and Triton would compile a kernel again for each that is 1 or a multiple of 16.

Shapes: N tokens, H hidden, V vocabulary, B blocks of 128 vocabulary rows, T tiles of tokens.
"""

# Triton gives constants as constexpr, which type checkers miss.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_UNIT = 4
"""Programs per multiprocessor where programs deal the work among themselves."""


@triton.jit
def softcap_parts(z, softcap):
    """``c * tanh(z / c)`` and its derivative, both exact to rounding where tanh saturates."""
    small = tl.exp(-2 * tl.abs(z / softcap))
    capped = softcap * (1 - small) / (1 + small)
    return tl.where(z < 0, -capped, capped), 4 * small / ((1 + small) * (1 + small))


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, mask_n, mask_v, stride_hn, stride_wv,
    H, logit_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Logits [ROWS, COLUMNS] in fp32 of tokens ``offs_n`` over rows ``offs_v``, before any softcap.

    ROUND: dtype that inputs are rounded to first, as under autocast.
    """
    offs_k = tl.arange(0, DEPTH)
    hidden_ptrs = hidden_ptr + offs_n.to(tl.int64)[:, None] * stride_hn + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_v.to(tl.int64)[None, :] * stride_wv + offs_k[:, None]
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for k in range(0, H, DEPTH):
        mask_k = offs_k < H - k
        a = tl.load(hidden_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(weight_ptrs, mask=mask_v[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(a.to(ROUND), b.to(ROUND), acc, input_precision="ieee")
        hidden_ptrs += DEPTH
        weight_ptrs += DEPTH
    return finish_logits(acc, bias_ptr, offs_v, mask_v, logit_scale, HAS_BIAS, ROUND)


@triton.jit
def finish_logits(
    z, bias_ptr, offs_v, mask_v, logit_scale, HAS_BIAS: tl.constexpr, ROUND: tl.constexpr
):
    """The products' bias and scale."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(ROUND).to(tl.float32)
        z += bias[None, :]
    return z * logit_scale


@triton.jit
def store_statistics(
    z, tile, group, targets_ptr, partial_lse_ptr, target_logits_ptr, profile_ptr, counts_ptr,
    N, V, B, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PROFILE: tl.constexpr,
):  # fmt: skip
    """Of logits ``z`` [ROWS, COLUMNS] before any softcap: all that the forward keeps.

    partial_lse [B, N], per block of WIDTH columns; target_logits [N]; profile [T, V] and counts
    [T, B], sums over the tile's tokens.
    """
    BLOCKS: tl.constexpr = COLUMNS // WIDTH
    offs_n = tile * ROWS + tl.arange(0, ROWS)
    offs_v = group * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_n < N
    mask_v = offs_v < V
    if HAS_SOFTCAP:
        z, slope = softcap_parts(z, softcap)
    z = tl.where(mask_v[None, :], z, float("-inf"))

    targets = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    hit = offs_v[None, :] == targets[:, None]
    target_logits = tl.sum(tl.where(hit, z, 0.0), axis=1)
    here = (targets >= group * COLUMNS) & (targets < group * COLUMNS + COLUMNS)
    tl.store(target_logits_ptr + offs_n, target_logits, mask=mask_n & here)

    blocked = tl.reshape(z, [ROWS, BLOCKS, WIDTH])
    top = tl.max(blocked, axis=2)
    top = tl.where(top == float("-inf"), 0.0, top)
    inside = tl.exp(blocked - top[:, :, None])
    sums = tl.sum(inside, axis=2)
    offs_b = group * BLOCKS + tl.arange(0, BLOCKS)
    mask_b = offs_b < B
    partial = top + tl.log(sums)
    partial_ptrs = partial_lse_ptr + offs_b.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(partial_ptrs, partial, mask=mask_n[:, None] & mask_b[None, :])

    if PROFILE:
        usable = (sums > 0) & (sums < float("inf")) & mask_n[:, None]
        share = tl.where(usable[:, :, None], inside / sums[:, :, None], 0.0)
        if HAS_SOFTCAP:
            share = tl.where(
                usable[:, :, None], share * tl.reshape(slope, [ROWS, BLOCKS, WIDTH]), 0.0
            )
        columns = tl.reshape(tl.sum(share, axis=0), [COLUMNS])
        tl.store(profile_ptr + tile.to(tl.int64) * V + offs_v, columns, mask=mask_v)
        counts = tl.sum(usable.to(tl.float32), axis=0)
        tl.store(counts_ptr + tile * B + offs_b, counts, mask=mask_b)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        dtype
    ]


def inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache
def programs(device: torch.device) -> int:
    """How many programs deal the work of a launch among themselves."""
    if device.type != "cuda":
        return 2 * PROGRAMS_PER_UNIT
    return PROGRAMS_PER_UNIT * torch.cuda.get_device_properties(device).multi_processor_count
