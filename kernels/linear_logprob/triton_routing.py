"""Triton for what surrounds the head's products in backward: routing, entries, the tail.

Each kernel reads its largest input once. `torch_backward.profile_means` does in torch what
`profile_means` does here; the benchmarks hold the same of `choose`. `cells.py` says what entries
are.

Shapes: N tokens, H hidden, V vocabulary, B vocabulary blocks, T tiles of 128 tokens, G groups of
`GROUP` blocks.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import ENOUGH, LEVELS, TILE, Entries, Routing, capacity_of, cell_stats, starts, top_cut
from .routing import BLOCK, TOP_CUT, num_blocks, target_grads, thresholds
from .triton_tile import FUSED, triton_dtype
from .types import HeadCall, Saved

GROUP = 16
"""Vocabulary blocks per program of the routing kernels."""
CONSTANTS = {"TILE": TILE, "BLOCK": BLOCK, "GROUP": GROUP, "num_warps": 4, **FUSED}
"""Of their launches."""


@triton.jit
def _load_tokens(token, mask, lse_ptr, logps_ptr, targets_ptr, thresholds_ptr):
    """lse, the target's probability, the target, and the bound from which a block is active."""
    lse = tl.load(lse_ptr + token, mask=mask, other=0.0)
    target_p = tl.exp(tl.load(logps_ptr + token, mask=mask, other=0.0))
    target = tl.load(targets_ptr + token, mask=mask, other=-1).to(tl.int32)
    return lse, target_p, target, tl.load(thresholds_ptr + token, mask=mask, other=float("inf"))


@triton.jit
def _split_mass(
    partial_lse_ptr, tops_ptr, block, token, mask, lse, target_p, target, cut, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's mass without target and top; the top's; whether that counts; is the target here.

    Comparisons of NaN are false, and no mass turns NaN into 0: `tl.maximum` would.
    """
    at = block.to(tl.int64) * N + token
    mass = tl.exp(tl.load(partial_lse_ptr + at, mask=mask, other=float("-inf")) - lse)
    packed = tl.load(tops_ptr + at, mask=mask, other=0)
    top = mass * (packed & -BLOCK).to(tl.float32, bitcast=True)
    local = target - block * BLOCK
    held = (local >= 0) & (local < BLOCK)
    counts = (top >= cut) & (local != (packed & (BLOCK - 1)))
    rest = mass - tl.where(held, target_p, 0.0) - tl.where(counts, top, 0.0)
    return tl.where(rest < 0, 0.0, rest), top, counts, held


@triton.jit(do_not_specialize=["N", "B"])
def _count_kernel(
    partial_lse_ptr, tops_ptr, lse_ptr, logps_ptr, targets_ptr, thresholds_ptr,
    counts_ptr, levels_ptr, N, B,
    TILE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    TOP_CUT: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """counts [G, N]: of each token's blocks in a group, those that are active.

    levels [LEVELS, G, N]: the tops there that would be entries with each bound.
    """
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = token < N
    lse, target_p, target, threshold = _load_tokens(
        token, mask, lse_ptr, logps_ptr, targets_ptr, thresholds_ptr
    )
    count = tl.zeros([TILE], dtype=tl.int32)
    level = tl.arange(0, LEVELS)[None, :]
    entries = tl.zeros([TILE, LEVELS], dtype=tl.int32)
    cut = TOP_CUT * threshold
    cuts = cut[:, None] * tl.exp2(2.0 * level)
    first = tl.program_id(1) * GROUP
    for j in range(GROUP):
        block = first + j
        if block < B:
            rest, top, counts, _ = _split_mass(
                partial_lse_ptr, tops_ptr, block, token, mask, lse, target_p, target, cut, N, BLOCK
            )
            count += (rest >= threshold).to(tl.int32)
            entries += (counts[:, None] & (top[:, None] >= cuts)).to(tl.int32)
    at = tl.program_id(1).to(tl.int64) * N + token
    tl.store(counts_ptr + at, count, mask=mask)
    levels_ptrs = levels_ptr + level * tl.num_programs(1).to(tl.int64) * N + at[:, None]
    tl.store(levels_ptrs, entries, mask=mask[:, None])


@triton.jit(do_not_specialize=["stride_w", "N", "B", "T"])
def _flag_kernel(
    partial_lse_ptr, tops_ptr, lse_ptr, logps_ptr, targets_ptr, thresholds_ptr,
    grad_ptr, order_ptr, top_cut_ptr,
    flags_ptr, weighted_ptr, averaged_ptr, marks_ptr, per_cell_ptr, per_token_ptr,
    stride_w, N, B, T,
    TILE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ENOUGH: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """flags [B, T] of one tile of sorted tokens and one group; the rest's mass; where entries are.

    weighted [B, N]: ``-g`` times the mass. averaged [G, N]: its sum over the group. marks [B, N]:
    1 where the top is an entry, 2 where the target is. per_cell [B, T], per_token [N, G]: how many.
    """
    tile = tl.program_id(0)
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < N
    token = tl.load(order_ptr + place, mask=mask, other=0)
    lse, target_p, target, threshold = _load_tokens(
        token, mask, lse_ptr, logps_ptr, targets_ptr, thresholds_ptr
    )
    grad = tl.load(grad_ptr + token, mask=mask, other=0.0)
    cut = tl.load(top_cut_ptr) * threshold
    enough = tl.maximum(tl.minimum(N - tile * TILE, TILE) * ENOUGH // TILE, 1)
    averaged = tl.zeros([TILE], dtype=tl.float32)
    mine = tl.zeros([TILE], dtype=tl.int32)
    first = tl.program_id(1) * GROUP
    for j in range(GROUP):
        block = first + j
        if block < B:
            rest, _, counts, held = _split_mass(
                partial_lse_ptr, tops_ptr, block, token, mask, lse, target_p, target, cut, N, BLOCK
            )
            active = tl.sum((rest >= threshold).to(tl.int32), axis=0)
            alone = tl.sum((rest >= ENOUGH * threshold).to(tl.int32), axis=0)
            flag = (active >= enough) | (alone > 0)
            tl.store(flags_ptr + block * T + tile, flag.to(tl.int8))
            rest = tl.where(flag, 0.0, rest)
            averaged += rest
            if WEIGHTED:
                weighted = (-grad * rest).to(weighted_ptr.dtype.element_ty)
                tl.store(weighted_ptr + block.to(tl.int64) * stride_w + place, weighted, mask=mask)
            top = (counts & (flag == 0)).to(tl.int32)
            marks = (top + 2 * held.to(tl.int32)).to(tl.int8)
            tl.store(marks_ptr + block.to(tl.int64) * N + place, marks, mask=mask)
            here = top + held.to(tl.int32)
            tl.store(per_cell_ptr + block * T + tile, tl.sum(here, axis=0))
            mine += here
    tl.store(averaged_ptr + tl.program_id(1).to(tl.int64) * N + place, averaged, mask=mask)
    per_token_ptrs = per_token_ptr + place.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(per_token_ptrs, mine, mask=mask)


@triton.jit(do_not_specialize=["N", "B", "T"])
def _entries_kernel(
    partial_lse_ptr, tops_ptr, lse_ptr, targets_ptr, grad_ptr, target_grad_ptr,
    order_ptr, marks_ptr, cell_starts_ptr, token_starts_ptr,
    places_ptr, place_grads_ptr, rows_ptr, row_grads_ptr, softcap, N, B, T,
    TILE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`Entries` of one tile of sorted tokens and one group; of a cell, tops before targets.

    cell_starts [B, T], token_starts [N, G]: where they begin in the lists.
    """
    tile = tl.program_id(0)
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < N
    token = tl.load(order_ptr + place, mask=mask, other=0)
    lse = tl.load(lse_ptr + token, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + token, mask=mask, other=0.0)
    target_grad = tl.load(target_grad_ptr + token, mask=mask, other=0.0)
    target = tl.load(targets_ptr + token, mask=mask, other=0).to(tl.int32)
    group = tl.program_id(1)
    starts_ptrs = token_starts_ptr + place.to(tl.int64) * tl.num_programs(1) + group
    to_row = tl.load(starts_ptrs, mask=mask, other=0)
    for j in range(GROUP):
        block = group * GROUP + j
        if block < B:
            at = block.to(tl.int64) * N
            marks = tl.load(marks_ptr + at + place, mask=mask, other=0).to(tl.int32)
            if tl.max(marks, axis=0) > 0:
                is_top = (marks & 1) > 0
                packed = tl.load(tops_ptr + at + token, mask=is_top, other=0)
                partial = tl.load(partial_lse_ptr + at + token, mask=is_top, other=0.0)
                column = packed & (BLOCK - 1)
                share = (packed & -BLOCK).to(tl.float32, bitcast=True)
                top_grad = -grad * tl.exp(partial - lse) * share
                if HAS_SOFTCAP:
                    capped = (partial + tl.log(share)) / softcap
                    top_grad *= 1 - capped * capped
                tops = is_top.to(tl.int32)
                start = tl.load(cell_starts_ptr + block * T + tile)
                to = start + tl.cumsum(tops, axis=0) - tops
                tl.store(places_ptr + to, place * BLOCK + column, mask=is_top)
                tl.store(place_grads_ptr + to, top_grad, mask=is_top)
                tl.store(rows_ptr + to_row, block * BLOCK + column, mask=is_top)
                tl.store(row_grads_ptr + to_row, top_grad, mask=is_top)
                to_row += tops
                targets = marks >> 1
                to = start + tl.sum(tops, axis=0) + tl.cumsum(targets, axis=0) - targets
                tl.store(places_ptr + to, place * BLOCK + target % BLOCK, mask=targets > 0)
                tl.store(place_grads_ptr + to, target_grad, mask=targets > 0)
                tl.store(rows_ptr + to_row, target, mask=targets > 0)
                tl.store(row_grads_ptr + to_row, target_grad, mask=targets > 0)
                to_row += targets


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


def choose(
    call: HeadCall, saved: Saved, grad: Tensor, scored: Tensor, tail_eps: float, *, weighted: bool
) -> Routing:
    """Sort the tokens and choose the cells to compute, in two readings of partial_lse.

    Args:
        saved: targets outside [0, V) are no entries.
        grad: [N], 0 where not ``scored``; ``logit_scale`` is applied here.
        tail_eps: above 0. weighted: whether the tail needs the pairs' masses.
    """
    blocks, tokens = saved.partial_lse.shape
    tiles, groups = triton.cdiv(tokens, TILE), triton.cdiv(blocks, GROUP)
    threshold = thresholds(grad, scored, tail_eps)
    new = saved.partial_lse.new_empty
    counts = new(groups, tokens, dtype=torch.int32)
    levels = new(LEVELS, groups, tokens, dtype=torch.int32)
    per_token = (saved.partial_lse, saved.tops, saved.lse, saved.logps, saved.targets, threshold)
    if tokens:
        _count_kernel[(tiles, groups)](
            *per_token, counts, levels, tokens, blocks,
            TOP_CUT=TOP_CUT, LEVELS=LEVELS, **CONSTANTS,
        )  # fmt: skip
    order = torch.argsort(counts.sum(0), descending=True, stable=True)
    flags, averaged = new(blocks, tiles, dtype=torch.int8), new(groups, tokens)
    # Rows of a multiple of 16 bytes, which the products' library wants.
    wide = -(-tokens // 8) * 8
    rest = new(blocks if weighted else 0, wide, dtype=call.compute_dtype)[:, :tokens]
    marks = torch.empty_like(saved.tops, dtype=torch.int8)
    per_cell, per_place = (new(s, dtype=torch.int32) for s in ((blocks, tiles), (tokens, groups)))
    scaled = grad * call.logit_scale
    if tokens:
        _flag_kernel[(tiles, groups)](
            *per_token, scaled, order, top_cut(levels), flags, rest, averaged,
            marks, per_cell, per_place, rest.stride(0), tokens, blocks, tiles,
            ENOUGH=ENOUGH, WEIGHTED=weighted, **CONSTANTS,
        )  # fmt: skip
    entries = _list_entries(call, saved, scaled, order, marks, per_cell, per_place)
    stats = cell_stats(flags.view(torch.bool), averaged.sum(0), scored[order])
    return Routing(order, flags.view(torch.bool), rest if weighted else None, entries, stats)


def _list_entries(
    call: HeadCall,
    saved: Saved,
    grad: Tensor,
    order: Tensor,
    marks: Tensor,
    per_cell: Tensor,
    per_place: Tensor,
) -> Entries:
    """Args: grad: [N] in the tokens' order, times ``logit_scale``. Others: see `_flag_kernel`."""
    (blocks, tiles), (tokens, groups) = per_cell.shape, per_place.shape
    cells, places, capacity = starts(per_cell), starts(per_place), capacity_of(tokens, blocks)
    lists = [marks.new_empty(capacity, dtype=torch.int32) for _ in range(2)]
    grads = [grad.new_empty(capacity) for _ in range(2)]
    if tokens:
        _entries_kernel[(tiles, groups)](
            saved.partial_lse, saved.tops, saved.lse, saved.targets, grad,
            target_grads(call, grad, saved.logps, saved.targets.clamp_min(0)), order, marks,
            cells, places, lists[0], grads[0], lists[1], grads[1],
            1.0 if call.softcap is None else call.softcap, tokens, blocks, tiles,
            HAS_SOFTCAP=call.softcap is not None, **CONSTANTS,
        )  # fmt: skip
    by_block, by_token = cells[:: max(tiles, 1)].contiguous(), places[::groups].contiguous()
    return Entries(lists[0], grads[0], by_block, lists[1], grads[1], by_token)


def profile_means(call: HeadCall, weight: Tensor, profile: Tensor) -> Tensor:
    """`torch_backward.profile_means` [B, H], rounded to the products' dtype, in one launch."""
    vocabulary, width = weight.shape
    means = profile.new_empty(num_blocks(vocabulary), width, dtype=call.compute_dtype)
    columns = 128
    _profile_kernel[(triton.cdiv(width, columns), num_blocks(vocabulary))](
        weight, profile, means, weight.stride(0), width, vocabulary,
        BLOCK=BLOCK, COLUMNS=columns, ROUND=triton_dtype(call.compute_dtype), **FUSED, num_warps=4,
    )  # fmt: skip
    return means
