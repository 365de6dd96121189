"""Triton for what surrounds the head's products in backward: routing, the tail, the targets.

Each kernel reads its largest input once. `torch_backward.profile_means` does in torch what
`profile_means` does here; the benchmarks hold the same of `choose`.

Shapes: N tokens, H hidden, V vocabulary, B vocabulary blocks, T tiles of 128 tokens, G groups of
`GROUP` blocks.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import ENOUGH, TILE
from .routing import BLOCK, num_blocks, thresholds
from .triton_tile import triton_dtype
from .types import HeadCall, Saved

GROUP = 16
"""Vocabulary blocks per program of the routing kernels."""


class Routing(NamedTuple):
    """What backward computes, and what is left to the tail.

    order: [N] int64, tokens sorted by active blocks. flags: [B, T] bool, the cells to compute.
    weighted: [B, N], ``-g`` times the mass of every other pair, of the sorted tokens; None without
    a tail. stats: [4], see `HeadStats`.
    """

    order: Tensor
    flags: Tensor
    weighted: Tensor | None
    stats: Tensor


@triton.jit
def _block_mass(partial_lse_ptr, block, token, mask, lse, target_p, target_block, N):
    """Probability of tokens [n] on a block, apart from the target's own."""
    partial = tl.load(partial_lse_ptr + block.to(tl.int64) * N + token, mask=mask, other=0.0)
    mass = tl.exp(partial - lse)
    rest = mass - target_p
    # Not tl.maximum, which would turn NaN into 0.
    rest = tl.where(rest < 0, 0.0, rest)
    return tl.where(target_block == block, rest, mass)


@triton.jit(do_not_specialize=["N", "B"])
def _count_kernel(
    partial_lse_ptr, lse_ptr, logps_ptr, targets_ptr, thresholds_ptr, counts_ptr, N, B,
    TILE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """counts [G, N]: of each token's blocks in a group, those that are active."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = token < N
    lse = tl.load(lse_ptr + token, mask=mask, other=0.0)
    target_p = tl.exp(tl.load(logps_ptr + token, mask=mask, other=0.0))
    target_block = (tl.load(targets_ptr + token, mask=mask, other=0) // BLOCK).to(tl.int32)
    threshold = tl.load(thresholds_ptr + token, mask=mask, other=float("inf"))
    count = tl.zeros([TILE], dtype=tl.int32)
    first = tl.program_id(1) * GROUP
    for j in range(GROUP):
        block = first + j
        if block < B:
            mass = _block_mass(partial_lse_ptr, block, token, mask, lse, target_p, target_block, N)
            count += (mass >= threshold).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(1).to(tl.int64) * N + token, count, mask=mask)


@triton.jit(do_not_specialize=["N", "B", "T"])
def _flag_kernel(
    partial_lse_ptr, lse_ptr, logps_ptr, targets_ptr, thresholds_ptr, grad_ptr, order_ptr,
    flags_ptr, weighted_ptr, averaged_ptr, N, B, T,
    TILE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ENOUGH: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """flags [B, T] of one tile of sorted tokens and one group; the rest's mass.

    weighted [B, N]: ``-g`` times it. averaged [G, N]: its sum over the group.
    """
    tile = tl.program_id(0)
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < N
    token = tl.load(order_ptr + place, mask=mask, other=0)
    lse = tl.load(lse_ptr + token, mask=mask, other=0.0)
    target_p = tl.exp(tl.load(logps_ptr + token, mask=mask, other=0.0))
    target_block = (tl.load(targets_ptr + token, mask=mask, other=0) // BLOCK).to(tl.int32)
    threshold = tl.load(thresholds_ptr + token, mask=mask, other=float("inf"))
    threshold = tl.where(mask, threshold, float("inf"))
    grad = tl.load(grad_ptr + token, mask=mask, other=0.0)
    enough = tl.maximum(tl.minimum(N - tile * TILE, TILE) * ENOUGH // TILE, 1)
    averaged = tl.zeros([TILE], dtype=tl.float32)
    first = tl.program_id(1) * GROUP
    for j in range(GROUP):
        block = first + j
        if block < B:
            mass = _block_mass(partial_lse_ptr, block, token, mask, lse, target_p, target_block, N)
            active = tl.sum((mass >= threshold).to(tl.int32), axis=0)
            alone = tl.sum((mass >= ENOUGH * threshold).to(tl.int32), axis=0)
            flag = (active >= enough) | (alone > 0)
            tl.store(flags_ptr + block * T + tile, flag.to(tl.int8))
            rest = tl.where(flag, 0.0, mass)
            averaged += rest
            if WEIGHTED:
                weighted = (-grad * rest).to(weighted_ptr.dtype.element_ty)
                tl.store(weighted_ptr + block.to(tl.int64) * N + place, weighted, mask=mask)
    tl.store(averaged_ptr + tl.program_id(1).to(tl.int64) * N + place, averaged, mask=mask)


@triton.jit
def _profile_kernel(
    weight_ptr, profile_ptr, means_ptr, stride_wv, H, V,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """means [B, H]: a block's average weight row under its profile [V]."""
    block = tl.program_id(1)
    offs_v = block * BLOCK + tl.arange(0, BLOCK)
    offs_h = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask_v = offs_v < V
    mask_h = offs_h < H
    profile = tl.load(profile_ptr + offs_v, mask=mask_v, other=0.0)
    weight_ptrs = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
    weight = tl.load(weight_ptrs, mask=mask_v[:, None] & mask_h[None, :], other=0.0)
    mean = tl.sum(weight.to(ROUND).to(tl.float32) * profile[:, None], axis=0)
    out = means_ptr + block.to(tl.int64) * H + offs_h
    tl.store(out, mean.to(means_ptr.dtype.element_ty), mask=mask_h)


@triton.jit
def _finish_kernel(
    d_hidden_ptr, target_grad_ptr, targets_ptr, order_ptr, weight_ptr, out_ptr,
    stride_wv, stride_on, H, COLUMNS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """out [N, H]: dH of the sorted tokens plus their targets' elements, in the tokens' order.

    target_grad [N]: of the sorted tokens. targets [N] in the tokens' order.
    """
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(order_ptr + place)
    target = tl.load(targets_ptr + token)
    target_grad = tl.load(target_grad_ptr + place)
    for start in range(0, H, COLUMNS):
        offs_h = start + tl.arange(0, COLUMNS)
        mask_h = offs_h < H
        grad = tl.load(d_hidden_ptr + place * H + offs_h, mask=mask_h, other=0.0)
        row = tl.load(weight_ptr + target * stride_wv + offs_h, mask=mask_h, other=0.0)
        grad += target_grad * row.to(ROUND).to(tl.float32)
        tl.store(
            out_ptr + token * stride_on + offs_h, grad.to(out_ptr.dtype.element_ty), mask=mask_h
        )


def choose(
    call: HeadCall, saved: Saved, grad: Tensor, scored: Tensor, tail_eps: float, *, weighted: bool
) -> Routing:
    """Sort the tokens and choose the cells to compute, in two readings of partial_lse.

    Args:
        grad: [N], 0 where not ``scored``; ``logit_scale`` is applied here.
        tail_eps: above 0. weighted: whether the tail needs the pairs' masses.
    """
    blocks, tokens = saved.partial_lse.shape
    tiles, groups = triton.cdiv(tokens, TILE), triton.cdiv(blocks, GROUP)
    threshold = thresholds(grad, scored, tail_eps)
    new = saved.partial_lse.new_empty
    counts = new(groups, tokens, dtype=torch.int32)
    per_token = (saved.partial_lse, saved.lse, saved.logps, saved.targets, threshold)
    constants = {"TILE": TILE, "BLOCK": BLOCK, "GROUP": GROUP, "num_warps": 4}
    if tokens:
        _count_kernel[(tiles, groups)](*per_token, counts, tokens, blocks, **constants)
    order = torch.argsort(counts.sum(0), descending=True, stable=True)
    flags = new(blocks, tiles, dtype=torch.int8)
    rest = new(blocks if weighted else 0, tokens, dtype=call.compute_dtype)
    averaged = new(groups, tokens)
    if tokens:
        _flag_kernel[(tiles, groups)](
            *per_token, grad * call.logit_scale, order, flags, rest, averaged,
            tokens, blocks, tiles, ENOUGH=ENOUGH, WEIGHTED=weighted, **constants,
        )  # fmt: skip
    flags = flags.view(torch.bool)
    stats = _stats(flags, averaged.sum(0), scored[order])
    return Routing(order, flags, rest if weighted else None, stats)


def every_cell(blocks: int, scored: Tensor, dtype: torch.dtype) -> Routing:
    """Every cell, tokens in their own order."""
    tokens = len(scored)
    order = torch.arange(tokens, device=scored.device)
    flags = scored.new_ones(blocks, triton.cdiv(tokens, TILE))
    stats = torch.zeros(4, dtype=dtype, device=scored.device)
    stats[0], stats[3] = scored.any(), 1.0
    return Routing(order, flags, None, stats)


def _stats(flags: Tensor, averaged: Tensor, scored: Tensor) -> Tensor:
    """As `routing.routing_stats`; averaged [N] and scored [N] are of the sorted tokens."""
    blocks, tiles = flags.shape
    missing = tiles * TILE - len(scored)
    per_tile = torch.nn.functional.pad(scored, (0, missing)).view(tiles, TILE).sum(1)
    count = per_tile.sum()
    each = (flags * per_tile).sum() / (count * blocks).clamp_min_(1)
    mass = torch.where(scored, averaged, 0.0)
    top = mass.max() if mass.numel() else mass.sum()
    dense = (flags | (per_tile == 0)).all()
    mean = mass.sum() / count.clamp_min(1)
    return torch.stack([each.to(mass.dtype), mean, top, dense.to(mass.dtype)])


def profile_means(call: HeadCall, weight: Tensor, profile: Tensor) -> Tensor:
    """`torch_backward.profile_means` [B, H], rounded to the products' dtype, in one launch."""
    vocabulary, width = weight.shape
    means = profile.new_empty(num_blocks(vocabulary), width, dtype=call.compute_dtype)
    columns = 128
    _profile_kernel[(triton.cdiv(width, columns), num_blocks(vocabulary))](
        weight, profile, means, weight.stride(0), width, vocabulary,
        BLOCK=BLOCK, COLUMNS=columns, ROUND=triton_dtype(call.compute_dtype), num_warps=4,
    )  # fmt: skip
    return means


def finish(
    call: HeadCall,
    d_hidden: Tensor,
    target_grad: Tensor,
    targets: Tensor,
    order: Tensor,
    weight: Tensor,
) -> Tensor:
    """dH [N, H] in the input's dtype and the tokens' order; see `_finish_kernel`."""
    out = torch.empty_like(call.hidden)
    rows = out if out.stride(1) == 1 else out.contiguous()
    tokens, width = out.shape
    if tokens:
        _finish_kernel[(tokens,)](
            d_hidden, target_grad, targets, order, weight, rows,
            weight.stride(0), rows.stride(0), width,
            COLUMNS=1024, ROUND=triton_dtype(call.compute_dtype), num_warps=4,
        )  # fmt: skip
    return out if rows is out else out.copy_(rows)
