"""Triton forward of the head: one tiled product whose epilogue keeps statistics, never logits.

Shapes: N tokens, H hidden, V vocabulary, B blocks of 128 vocabulary rows, T tiles of tokens.
The mathematics stand in `linear_logprob.py`.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .routing import BLOCK, num_blocks
from .tiles import tiles_for
from .torch_head import Head

INTERPRETED = bool(triton.knobs.runtime.interpret)


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
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(ROUND).to(tl.float32)
        acc += bias[None, :]
    return acc * logit_scale


@triton.jit
def _forward_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr,
    partial_lse_ptr, target_logits_ptr, profile_ptr, counts_ptr,
    stride_hn, stride_wv, N, H, V, B, logit_scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PROFILE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """One [ROWS, COLUMNS] tile: partial lse per block of WIDTH columns, targets, profile sums.

    partial_lse [B, N]; target_logits [N]; profile [T, V] and counts [T, B] are sums over the
    tile's tokens. Token tiles run fastest, so that a weight tile is read from memory once.
    """
    tile = tl.program_id(0)
    group = tl.program_id(1)
    BLOCKS: tl.constexpr = COLUMNS // WIDTH
    offs_n = tile * ROWS + tl.arange(0, ROWS)
    offs_v = group * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_n < N
    mask_v = offs_v < V
    z = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, mask_n, mask_v, stride_hn, stride_wv,
        H, logit_scale, ROWS, COLUMNS, DEPTH, HAS_BIAS, ROUND,
    )  # fmt: skip
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


def forward(head: Head, targets: Tensor, *, keep: bool, profile: bool) -> tuple[Tensor, ...]:
    """As `torch_head.forward`: logps [N], lse [N], partial_lse [B, N], profile [V] or empty."""
    tile = tiles_for(head.compute_dtype, head.hidden.device).forward
    if head.softcap is not None:
        tile = tile._replace(columns=BLOCK)
    bias, softcap = head.bias, head.softcap
    hidden, weight = _inner_contiguous(head.hidden), _inner_contiguous(head.weight)
    (rows, width), vocabulary = hidden.shape, len(weight)
    blocks, tiles = num_blocks(vocabulary), triton.cdiv(rows, tile.rows)

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    partial_lse, target_logits = new(blocks, rows), new(rows)
    sums, counts = new(tiles, vocabulary if profile else 0), new(tiles, blocks)
    if rows:
        _forward_kernel[(tiles, triton.cdiv(vocabulary, tile.columns))](
            hidden, weight, weight if bias is None else bias, targets,
            partial_lse, target_logits, sums, counts,
            hidden.stride(0), weight.stride(0), rows, width, vocabulary, blocks,
            head.logit_scale, 1.0 if softcap is None else softcap,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WIDTH=BLOCK,
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, PROFILE=profile,
            ROUND=triton_dtype(head.compute_dtype), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    lse = partial_lse.logsumexp(0)
    profiles = sums.sum(0)
    if profile:
        total = counts.sum(0).clamp_min_(1).repeat_interleave(BLOCK, output_size=blocks * BLOCK)
        profiles /= total[:vocabulary]
    return target_logits - lse, lse, partial_lse if keep else partial_lse[:0], profiles


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        dtype
    ]


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
