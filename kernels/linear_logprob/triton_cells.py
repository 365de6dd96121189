"""Triton kernels of the head's backward over cells of 128 tokens by 128 vocabulary rows.

Per slice of the workspace, each output tile accumulated in fp32 registers and (dW) written once:
``G = -g p`` of every cell; ``dW_block = G.T @ hidden`` with entries (see `cells.py`) and the tail
as extra terms; ``dH_tile += G @ weight``; db, the sums of G's columns. At the end, dH's entries.

Sizes of slices are known on the device alone, so a fixed number of programs deals the units of work
among itself in turn: heavy ones first, and a slice without work costs next to nothing.

The products take their operands by pointers, or by tensor descriptors (``_desc``) where a launch
has these: sorted tokens need no gather, so the chip can copy tiles by itself (sm_90 and newer).

Shapes: N tokens (sorted, see `cells.py`), H hidden, V vocabulary, B blocks, T tiles of 128 tokens.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tile import LOG2E, add_bias, described_product, exp2, logits_tile, softcap_parts


@triton.jit(do_not_specialize=["N", "T", "piece"])
def _recompute_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, lse_ptr, grad_ptr, entropy_ptr, entropy_grad_ptr,
    cells_ptr, slices_ptr, work_ptr, hidden_desc, weight_desc,
    stride_hn, stride_wv, N, H, V, T, piece, logit_scale, softcap,
    TILE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """``-g p`` times the softcap's slope of a slice's cells, 0 at targets.

    ENTROPY: ``-p (g + g_entropy (log p + entropy))`` times it. work: [cell, TILE, BLOCK]. hidden,
    targets, lse, grad: of the sorted tokens.
    """
    first = tl.load(slices_ptr + piece).to(tl.int32)
    last = tl.load(slices_ptr + piece + 1).to(tl.int32)
    inside = tl.arange(0, TILE)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for i in range(first + tl.program_id(0), last, tl.num_programs(0)):
        cell = tl.load(cells_ptr + i).to(tl.int32)
        offs_n = (cell % T) * TILE + tl.arange(0, TILE)
        offs_v = (cell // T) * BLOCK + tl.arange(0, BLOCK)
        mask_n = offs_n < N
        mask_v = offs_v < V
        if hidden_desc is None:
            z = logits_tile(
                hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, mask_n, mask_v,
                stride_hn, stride_wv, H, TILE, BLOCK, DEPTH, HAS_BIAS, ROUND,
            )  # fmt: skip
        else:
            z = described_product(
                hidden_desc, weight_desc, (cell % T) * TILE, (cell // T) * BLOCK, H,
                TILE, BLOCK, DEPTH,
            )  # fmt: skip
            z = add_bias(z, bias_ptr, offs_v, mask_v, HAS_BIAS, ROUND)
        z *= logit_scale
        if HAS_SOFTCAP:
            z, slope = softcap_parts(z, softcap)
        lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
        grad = tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0)
        targets = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
        g = exp2((z - lse[:, None]) * LOG2E)
        if HAS_SOFTCAP:
            g *= slope
        if ENTROPY:
            entropy = tl.load(entropy_ptr + offs_n, mask=mask_n, other=0.0)
            entropy_grad = tl.load(entropy_grad_ptr + offs_n, mask=mask_n, other=0.0)
            grad += entropy_grad * (entropy - lse)
            z = tl.where(z == float("-inf"), 0.0, z)
            g *= -(grad[:, None] + entropy_grad[:, None] * z)
        else:
            g *= -grad[:, None]
        g = tl.where(mask_v[None, :] & (offs_v[None, :] != targets[:, None]), g, 0.0)
        g = tl.where(mask_n[:, None], g, 0.0)
        work = work_ptr + (i - first).to(tl.int64) * (TILE * BLOCK)
        tl.store(work + inside, g.to(ROUND))


@triton.jit
def _with_entries(
    acc, hidden_ptr, places_ptr, place_grads_ptr, entry_bounds_ptr, block, offs_h, mask_h,
    stride_hn, BLOCK: tl.constexpr, STEP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """dW ``acc`` [BLOCK, columns] of a block with its entries, STEP at a time as one product."""
    row = tl.arange(0, BLOCK)
    last_entry = tl.load(entry_bounds_ptr + block + 1)
    for first_entry in range(tl.load(entry_bounds_ptr + block), last_entry, STEP):
        entry = first_entry + tl.arange(0, STEP)
        mask_e = entry < last_entry
        place = tl.load(places_ptr + entry, mask=mask_e, other=0)
        grad = tl.load(place_grads_ptr + entry, mask=mask_e, other=0.0)
        hot = tl.where(row[:, None] == (place % BLOCK)[None, :], grad[None, :], 0.0)
        hidden_ptrs = hidden_ptr + (place // BLOCK).to(tl.int64)[:, None] * stride_hn
        mask = mask_e[:, None] & mask_h[None, :]
        hidden = tl.load(hidden_ptrs + offs_h[None, :], mask=mask, other=0.0)
        acc = tl.dot(hot.to(ROUND), hidden.to(ROUND), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["N", "T", "piece", "columns"])
def _weight_kernel(
    hidden_ptr, work_ptr, places_ptr, place_grads_ptr, entry_bounds_ptr,
    profile_ptr, tail_grad_ptr, d_weight_ptr,
    cells_ptr, slices_ptr, slice_blocks_ptr, by_count_ptr, block_bounds_ptr,
    hidden_desc, work_desc, stride_hn, N, H, V, T, piece, columns,
    TILE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STEP: tl.constexpr, TAIL: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """dW [BLOCK, COLUMNS] of a slice's vocabulary blocks, complete.

    places, place_grads, entry_bounds: see `Entries`, of which it takes STEP at a time. tail_grad
    [B, H]: the tail's share of each block, spread by the profile [V]. columns: of column tiles.
    """
    first = tl.load(slices_ptr + piece).to(tl.int32)
    first_block = tl.load(slice_blocks_ptr + piece).to(tl.int32)
    units = (tl.load(slice_blocks_ptr + piece + 1).to(tl.int32) - first_block) * columns
    row = tl.arange(0, BLOCK)
    step = tl.arange(0, DEPTH)
    PARTS: tl.constexpr = TILE // DEPTH
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        block = tl.load(by_count_ptr + first_block + unit // columns).to(tl.int32)
        start = (unit % columns) * COLUMNS
        offs_h = start + tl.arange(0, COLUMNS)
        mask_h = offs_h < H
        offs_v = block * BLOCK + row
        mask_v = offs_v < V
        acc = tl.zeros([BLOCK, COLUMNS], dtype=tl.float32)

        begin = tl.load(block_bounds_ptr + block).to(tl.int32)
        end = tl.load(block_bounds_ptr + block + 1).to(tl.int32)
        # A cell's tile is read one step ahead, since waiting for it would cost a pipeline stage.
        tile = tl.load(cells_ptr + begin).to(tl.int32) % T
        for i in range(begin * PARTS, end * PARTS):
            part = (i % PARTS) * DEPTH
            if work_desc is None:
                work = work_ptr + (i // PARTS - first).to(tl.int64) * (TILE * BLOCK)
                g = tl.load(work + (part + step)[None, :] * BLOCK + row[:, None])
                offs_n = tile * TILE + part + step
                hidden_ptrs = (
                    hidden_ptr + offs_n.to(tl.int64)[:, None] * stride_hn + offs_h[None, :]
                )
                mask = (offs_n < N)[:, None] & mask_h[None, :]
                hidden = tl.load(hidden_ptrs, mask=mask, other=0.0)
            else:
                g = work_desc.load([(i // PARTS - first) * TILE + part, 0]).T
                hidden = hidden_desc.load([tile * TILE + part, start])
            tile = tl.load(cells_ptr + (i + 1) // PARTS).to(tl.int32) % T
            acc = tl.dot(g, hidden.to(ROUND), acc, input_precision="ieee")

        acc = _with_entries(
            acc, hidden_ptr, places_ptr, place_grads_ptr, entry_bounds_ptr, block, offs_h, mask_h,
            stride_hn, BLOCK, STEP, ROUND,
        )  # fmt: skip
        if TAIL:
            profile = tl.load(profile_ptr + offs_v, mask=mask_v, other=0.0)
            tail_ptrs = tail_grad_ptr + block.to(tl.int64) * H + offs_h
            acc += profile[:, None] * tl.load(tail_ptrs, mask=mask_h, other=0.0)[None, :]
        out = d_weight_ptr + offs_v.to(tl.int64)[:, None] * H + offs_h[None, :]
        mask = mask_v[:, None] & mask_h[None, :]
        tl.store(out, acc.to(d_weight_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["piece"])
def _bias_kernel(
    work_ptr, places_ptr, place_grads_ptr, entry_bounds_ptr, profile_ptr, tail_bias_ptr, d_bias_ptr,
    slices_ptr, slice_blocks_ptr, block_bounds_ptr, V, piece,
    TILE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """db [BLOCK] of a slice's vocabulary blocks, as `_weight_kernel` does dW; tail_bias: [B]."""
    first = tl.load(slices_ptr + piece).to(tl.int32)
    first_block = tl.load(slice_blocks_ptr + piece).to(tl.int32)
    last_block = tl.load(slice_blocks_ptr + piece + 1).to(tl.int32)
    row = tl.arange(0, BLOCK)
    inside = tl.arange(0, TILE)[:, None] * BLOCK + row[None, :]
    for block in range(first_block + tl.program_id(0), last_block, tl.num_programs(0)):
        offs_v = block * BLOCK + row
        mask_v = offs_v < V
        d_bias = tl.zeros([BLOCK], dtype=tl.float32)
        begin = tl.load(block_bounds_ptr + block).to(tl.int32)
        end = tl.load(block_bounds_ptr + block + 1).to(tl.int32)
        for cell in range(begin, end):
            g = tl.load(work_ptr + (cell - first).to(tl.int64) * (TILE * BLOCK) + inside)
            d_bias += tl.sum(g.to(tl.float32), axis=0)
        last_entry = tl.load(entry_bounds_ptr + block + 1)
        for first_entry in range(tl.load(entry_bounds_ptr + block), last_entry, TILE):
            entry = first_entry + tl.arange(0, TILE)
            mask_e = entry < last_entry
            column = tl.load(places_ptr + entry, mask=mask_e, other=0) % BLOCK
            grad = tl.load(place_grads_ptr + entry, mask=mask_e, other=0.0)
            d_bias += tl.sum(tl.where(column[:, None] == row[None, :], grad[:, None], 0.0), axis=0)
        if TAIL:
            profile = tl.load(profile_ptr + offs_v, mask=mask_v, other=0.0)
            d_bias += profile * tl.load(tail_bias_ptr + block)
        tl.store(d_bias_ptr + offs_v, d_bias, mask=mask_v)


@triton.jit(do_not_specialize=["N", "T", "piece", "pieces", "columns"])
def _hidden_kernel(
    weight_ptr, work_ptr, d_hidden_ptr,
    by_tile_ptr, tile_blocks_ptr, slices_ptr, tile_bounds_ptr, weight_desc, work_desc,
    stride_wv, N, H, V, T, piece, pieces, columns,
    TILE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Add a slice's cells to dH [TILE, COLUMNS] (fp32) of the tiles of sorted tokens.

    columns: number of column tiles.
    """
    first = tl.load(slices_ptr + piece).to(tl.int32)
    row = tl.arange(0, TILE)
    step = tl.arange(0, DEPTH)
    PARTS: tl.constexpr = BLOCK // DEPTH
    for unit in range(tl.program_id(0), T * columns, tl.num_programs(0)):
        tile = unit // columns
        begin = tl.load(tile_bounds_ptr + tile * (pieces + 1) + piece).to(tl.int32)
        end = tl.load(tile_bounds_ptr + tile * (pieces + 1) + piece + 1).to(tl.int32)
        if begin < end:
            start = (unit % columns) * COLUMNS
            offs_h = start + tl.arange(0, COLUMNS)
            mask_h = offs_h < H
            offs_n = tile * TILE + row
            out = d_hidden_ptr + offs_n.to(tl.int64)[:, None] * H + offs_h[None, :]
            mask = (offs_n < N)[:, None] & mask_h[None, :]
            acc = tl.load(out, mask=mask, other=0.0)
            cell = tl.load(by_tile_ptr + begin)
            block = tl.load(tile_blocks_ptr + begin).to(tl.int32)
            for i in range(begin * PARTS, end * PARTS):
                part = (i % PARTS) * DEPTH
                if work_desc is None:
                    work = work_ptr + (cell - first) * (TILE * BLOCK)
                    g = tl.load(work + row[:, None] * BLOCK + (part + step)[None, :])
                    offs_v = block * BLOCK + part + step
                    weight_ptrs = (
                        weight_ptr + offs_v.to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
                    )
                    weight = tl.load(
                        weight_ptrs, mask=(offs_v < V)[:, None] & mask_h[None, :], other=0.0
                    )
                else:
                    g = work_desc.load([(cell - first).to(tl.int32) * TILE, part])
                    weight = weight_desc.load([block * BLOCK + part, start])
                # One step ahead, as in the kernel above.
                cell = tl.load(by_tile_ptr + (i + 1) // PARTS)
                block = tl.load(tile_blocks_ptr + (i + 1) // PARTS).to(tl.int32)
                acc = tl.dot(g, weight.to(ROUND), acc, input_precision="ieee")
            tl.store(out, acc, mask=mask)


@triton.jit
def _finish_kernel(
    d_hidden_ptr, rows_ptr, row_grads_ptr, token_bounds_ptr, order_ptr, weight_ptr, out_ptr,
    stride_wv, stride_on, H, V, COLUMNS: tl.constexpr, STEP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """out [N, H] in the tokens' order: dH of a sorted token, and its entries, STEP at a time."""
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(order_ptr + place)
    offs_h = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask_h = offs_h < H
    acc = tl.load(d_hidden_ptr + place * H + offs_h, mask=mask_h, other=0.0)
    last_entry = tl.load(token_bounds_ptr + place + 1)
    for first_entry in range(tl.load(token_bounds_ptr + place), last_entry, STEP):
        entry = first_entry + tl.arange(0, STEP)
        mask_e = entry < last_entry
        row = tl.load(rows_ptr + entry, mask=mask_e, other=0)
        grad = tl.load(row_grads_ptr + entry, mask=mask_e, other=0.0)
        weight_ptrs = weight_ptr + row.to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
        mask = (mask_e & (row >= 0) & (row < V))[:, None] & mask_h[None, :]
        weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(ROUND).to(tl.float32)
        acc += tl.sum(grad[:, None] * weight, axis=0)
    tl.store(out_ptr + token * stride_on + offs_h, acc.to(out_ptr.dtype.element_ty), mask=mask_h)
