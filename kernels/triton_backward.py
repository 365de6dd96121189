"""Triton backward of the head over cells: recompute G, then dW and dH from it, without atomics.

Three kernels per slice of the workspace, each output tile accumulated in fp32 registers and (dW)
written once: ``G = -g p`` of every cell; ``dW_block = G.T @ hidden`` with the targets' own elements
and the tail as extra terms; ``dH_tile += G @ weight``.

Shapes: N tokens (sorted, see `cells.py`), H hidden, V vocabulary, B blocks, T tiles of 128 tokens.
"""

# Triton adds launch options to calls and gives constants as constexpr, which type checkers miss.
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cells import TILE, Cells, choose_cells, list_cells, slice_count
from .routing import BLOCK, num_blocks, routing_stats
from .tiles import tiles_for
from .torch_head import Head
from .torch_head_backward import Gradients, Saved, profile_means
from .triton_forward import logits_tile, softcap_parts, triton_dtype

WORKSPACE_BYTES = 256 * 2**20
"""Most memory for the cells' G."""


@triton.jit
def _recompute_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, lse_ptr, grad_ptr,
    blocks_ptr, tiles_ptr, slices_ptr, work_ptr,
    stride_hn, stride_wv, N, H, V, piece, logit_scale, softcap,
    TILE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """``-g p`` times the softcap's slope of one cell, 0 at targets.

    work: [cell, TILE, BLOCK]. hidden, targets, lse, grad: of the sorted tokens.
    """
    first = tl.load(slices_ptr + piece)
    cell = first + tl.program_id(0)
    if cell >= tl.load(slices_ptr + piece + 1):
        return
    offs_n = tl.load(tiles_ptr + cell) * TILE + tl.arange(0, TILE)
    offs_v = tl.load(blocks_ptr + cell) * BLOCK + tl.arange(0, BLOCK)
    mask_n = offs_n < N
    mask_v = offs_v < V
    z = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, mask_n, mask_v, stride_hn, stride_wv,
        H, logit_scale, TILE, BLOCK, DEPTH, HAS_BIAS, ROUND,
    )  # fmt: skip
    if HAS_SOFTCAP:
        z, slope = softcap_parts(z, softcap)
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
    grad = tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0)
    targets = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    g = tl.exp(z - lse[:, None]) * -grad[:, None]
    if HAS_SOFTCAP:
        g *= slope
    g = tl.where(mask_v[None, :] & (offs_v[None, :] != targets[:, None]), g, 0.0)
    g = tl.where(mask_n[:, None], g, 0.0)
    inside = tl.arange(0, TILE)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    work = work_ptr + tl.program_id(0).to(tl.int64) * (TILE * BLOCK)
    tl.store(work + inside, g.to(ROUND))


@triton.jit
def _weight_kernel(
    hidden_ptr, work_ptr, own_ptr, targets_ptr, by_target_ptr, target_bounds_ptr,
    profile_ptr, pull_ptr, pull_bias_ptr, d_weight_ptr, d_bias_ptr,
    tiles_ptr, slices_ptr, block_bounds_ptr, block_slices_ptr,
    stride_hn, N, H, V, piece,
    TILE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TAIL: tl.constexpr, D_BIAS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """dW [BLOCK, COLUMNS] of one vocabulary block, complete; db too in the first column.

    by_target [N]: sorted tokens by their target's block; target_bounds [B + 1].
    """
    block = tl.program_id(1)
    if tl.load(block_slices_ptr + block) != piece:
        return
    first = tl.load(slices_ptr + piece)
    offs_h = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask_h = offs_h < H
    row = tl.arange(0, BLOCK)
    offs_v = block * BLOCK + row
    mask_v = offs_v < V
    step = tl.arange(0, DEPTH)
    acc = tl.zeros([BLOCK, COLUMNS], dtype=tl.float32)
    d_bias = tl.zeros([BLOCK], dtype=tl.float32)
    PARTS: tl.constexpr = TILE // DEPTH

    begin = tl.load(block_bounds_ptr + block)
    end = tl.load(block_bounds_ptr + block + 1)
    for i in range(begin * PARTS, end * PARTS):
        cell = i // PARTS
        token = (i % PARTS) * DEPTH + step
        work = work_ptr + (cell - first).to(tl.int64) * (TILE * BLOCK)
        g = tl.load(work + token[None, :] * BLOCK + row[:, None])
        offs_n = tl.load(tiles_ptr + cell) * TILE + token
        hidden_ptrs = hidden_ptr + offs_n.to(tl.int64)[:, None] * stride_hn + offs_h[None, :]
        hidden = tl.load(hidden_ptrs, mask=(offs_n < N)[:, None] & mask_h[None, :], other=0.0)
        acc = tl.dot(g, hidden.to(ROUND), acc, input_precision="ieee")
        if D_BIAS:
            d_bias += tl.sum(g.to(tl.float32), axis=1)

    target_begin = tl.load(target_bounds_ptr + block)
    target_end = tl.load(target_bounds_ptr + block + 1)
    for j in range(target_begin, target_end, DEPTH):
        mask_j = j + step < target_end
        token = tl.load(by_target_ptr + j + step, mask=mask_j, other=0)
        own = tl.load(own_ptr + token, mask=mask_j, other=0.0)
        local = tl.load(targets_ptr + token, mask=mask_j, other=-1) - block * BLOCK
        hot = tl.where(row[:, None] == local[None, :], own[None, :], 0.0)
        hidden_ptrs = hidden_ptr + token[:, None] * stride_hn + offs_h[None, :]
        hidden = tl.load(hidden_ptrs, mask=mask_j[:, None] & mask_h[None, :], other=0.0)
        acc = tl.dot(hot.to(ROUND), hidden.to(ROUND), acc, input_precision="ieee")
        if D_BIAS:
            d_bias += tl.sum(hot, axis=1)

    if TAIL:
        profile = tl.load(profile_ptr + offs_v, mask=mask_v, other=0.0)
        pull = tl.load(pull_ptr + block.to(tl.int64) * H + offs_h, mask=mask_h, other=0.0)
        acc -= profile[:, None] * pull[None, :]
        d_bias -= profile * tl.load(pull_bias_ptr + block)
    out = d_weight_ptr + offs_v.to(tl.int64)[:, None] * H + offs_h[None, :]
    tl.store(out, acc.to(d_weight_ptr.dtype.element_ty), mask=mask_v[:, None] & mask_h[None, :])
    if D_BIAS and tl.program_id(0) == 0:
        tl.store(d_bias_ptr + offs_v, d_bias, mask=mask_v)


@triton.jit
def _hidden_kernel(
    weight_ptr, work_ptr, d_hidden_ptr,
    blocks_ptr, by_tile_ptr, slices_ptr, tile_bounds_ptr,
    stride_wv, N, H, V, piece, pieces,
    TILE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """Add a slice's cells to dH [TILE, COLUMNS] (fp32) of one tile of sorted tokens."""
    tile = tl.program_id(1)
    begin = tl.load(tile_bounds_ptr + tile * (pieces + 1) + piece)
    end = tl.load(tile_bounds_ptr + tile * (pieces + 1) + piece + 1)
    if begin == end:
        return
    first = tl.load(slices_ptr + piece)
    offs_h = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask_h = offs_h < H
    row = tl.arange(0, TILE)
    step = tl.arange(0, DEPTH)
    acc = tl.zeros([TILE, COLUMNS], dtype=tl.float32)
    PARTS: tl.constexpr = BLOCK // DEPTH
    for i in range(begin * PARTS, end * PARTS):
        cell = tl.load(by_tile_ptr + i // PARTS)
        column = (i % PARTS) * DEPTH + step
        work = work_ptr + (cell - first).to(tl.int64) * (TILE * BLOCK)
        g = tl.load(work + row[:, None] * BLOCK + column[None, :])
        offs_v = tl.load(blocks_ptr + cell) * BLOCK + column
        weight_ptrs = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
        weight = tl.load(weight_ptrs, mask=(offs_v < V)[:, None] & mask_h[None, :], other=0.0)
        acc = tl.dot(g, weight.to(ROUND), acc, input_precision="ieee")
    offs_n = tile * TILE + row
    out = d_hidden_ptr + offs_n.to(tl.int64)[:, None] * H + offs_h[None, :]
    mask = (offs_n < N)[:, None] & mask_h[None, :]
    tl.store(out, tl.load(out, mask=mask, other=0.0) + acc, mask=mask)


def backward(
    head: Head,
    saved: Saved,
    grad: Tensor,
    scored: Tensor,
    tail_eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Gradients, Tensor]:
    """As `torch_head_backward.backward`, over cells in place of single pairs."""
    (tokens, width), vocabulary = head.hidden.shape, len(head.weight)
    blocks = num_blocks(vocabulary)
    routed, order, flags = choose_cells(
        saved.partial_lse, saved.lse, saved.logps, saved.targets, grad, scored, tail_eps
    )
    stats = routing_stats(routed, scored)
    element = torch.empty((), dtype=head.compute_dtype).element_size()
    token_tiles = flags.shape[1]
    capacity = max(WORKSPACE_BYTES // (TILE * BLOCK * element), token_tiles + 1)
    capacity = min(capacity, blocks * token_tiles + token_tiles + 1)
    cells = list_cells(flags, order, capacity)
    grad = grad * head.logit_scale
    own = head.own_coefficients(grad, saved.logps, saved.targets)
    weighted = routed.averaged.mul_(grad) if saved.profile.numel() and tail_eps else None
    run = _Launches(head, saved, cells, grad, own, weighted, capacity, blocks)
    d_hidden = run.first_d_hidden() if needs[0] else None
    new = head.weight.new_empty
    d_weight = new(vocabulary, width) if needs[1] else None
    d_bias = new(vocabulary, dtype=torch.float32) if needs[2] else None
    if d_weight is None and needs[2]:
        d_weight = new(vocabulary, width)
    for piece in range(slice_count(blocks, token_tiles, capacity)) if tokens else ():
        run.recompute(piece)
        if d_weight is not None:
            run.weight(piece, d_weight, d_bias)
        if d_hidden is not None:
            run.hidden(piece, d_hidden)
    if not tokens:
        d_weight, d_bias = (None if x is None else x.zero_() for x in (d_weight, d_bias))
    if d_hidden is not None:
        d_hidden = run.last_d_hidden(d_hidden)
    bias = head.bias
    return Gradients(
        d_hidden,
        d_weight if needs[1] else None,
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    ), stats


class _Launches:
    """The launches of one backward pass, over tokens sorted by ``cells.order``."""

    def __init__(
        self,
        head: Head,
        saved: Saved,
        cells: Cells,
        grad: Tensor,
        own: Tensor,
        weighted: Tensor | None,
        capacity: int,
        blocks: int,
    ) -> None:
        order = cells.order
        self.head, self.cells = head, cells
        self.tiles = tiles_for(head.compute_dtype, head.hidden.device)
        self.saved, self.weighted = saved, weighted
        self.hidden_rows = head.hidden.to(head.compute_dtype).index_select(0, order)
        self.grad, self.own = grad[order], own[order]
        self.targets, self.lse = saved.targets[order], saved.lse[order]
        self.weight_rows = head.weight if head.weight.stride(1) == 1 else head.weight.contiguous()
        self.capacity = capacity
        target_blocks = self.targets // BLOCK
        self.by_target = torch.argsort(target_blocks, stable=True)
        steps = torch.arange(blocks + 1, device=order.device)
        sorted_blocks = target_blocks[self.by_target]
        self.target_bounds = torch.searchsorted(sorted_blocks, steps).int()
        self.pull = self.pull_bias = self.own
        if weighted is not None:
            hidden = head.operand(head.hidden)
            self.pull = head.product(weighted.to(hidden.dtype), hidden)
            self.pull_bias = weighted.sum(1)
        self.work = grad.new_empty(capacity, TILE, BLOCK, dtype=head.compute_dtype)
        self.pieces = cells.tile_bounds.shape[1] - 1
        self.constants = {"TILE": TILE, "BLOCK": BLOCK, "ROUND": triton_dtype(head.compute_dtype)}

    def recompute(self, piece: int) -> None:
        head, cells, tile = self.head, self.cells, self.tiles.recompute
        _recompute_kernel[(self.capacity,)](
            self.hidden_rows, self.weight_rows,
            self.weight_rows if head.bias is None else head.bias,
            self.targets, self.lse, self.grad, cells.blocks, cells.tiles, cells.slices, self.work,
            self.hidden_rows.stride(0), self.weight_rows.stride(0),
            len(self.hidden_rows), self.hidden_rows.shape[1], len(self.weight_rows), piece,
            head.logit_scale, 1.0 if head.softcap is None else head.softcap,
            DEPTH=tile.depth, HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None, **self.constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def weight(self, piece: int, d_weight: Tensor, d_bias: Tensor | None) -> None:
        cells, tile = self.cells, self.tiles.d_weight
        vocabulary, width = d_weight.shape
        _weight_kernel[(triton.cdiv(width, tile.columns), num_blocks(vocabulary))](
            self.hidden_rows, self.work, self.own, self.targets, self.by_target,
            self.target_bounds, self.saved.profile, self.pull, self.pull_bias, d_weight,
            self.own if d_bias is None else d_bias,
            cells.tiles, cells.slices, cells.block_bounds, cells.block_slices,
            self.hidden_rows.stride(0), len(self.hidden_rows), width, vocabulary, piece,
            COLUMNS=tile.columns, DEPTH=tile.depth, TAIL=self.weighted is not None,
            D_BIAS=d_bias is not None, **self.constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def hidden(self, piece: int, d_hidden: Tensor) -> None:
        cells, tile = self.cells, self.tiles.d_hidden
        tokens, width = d_hidden.shape
        _hidden_kernel[(triton.cdiv(width, tile.columns), triton.cdiv(tokens, TILE))](
            self.weight_rows, self.work, d_hidden,
            cells.blocks, cells.by_tile, cells.slices, cells.tile_bounds,
            self.weight_rows.stride(0), tokens, width, len(self.weight_rows), piece, self.pieces,
            COLUMNS=tile.columns, DEPTH=tile.depth, **self.constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def first_d_hidden(self) -> Tensor:
        """dH [N, H] of the sorted tokens as the tail leaves it, fp32."""
        if self.weighted is None:
            return self.grad.new_zeros(self.hidden_rows.shape)
        head = self.head
        means = profile_means(head, self.saved.profile).to(head.operand_dtype)
        weighted = self.weighted.T[self.cells.order].to(head.operand_dtype)
        return head.product(weighted, means).neg_()

    def last_d_hidden(self, d_hidden: Tensor) -> Tensor:
        """Add the targets' own elements; tokens back in their order, in the input's dtype."""
        own_rows = self.weight_rows.index_select(0, self.targets).to(self.head.compute_dtype)
        d_hidden.addcmul_(self.own[:, None], own_rows.to(d_hidden.dtype))
        out = torch.empty_like(self.head.hidden)
        return out.index_copy_(0, self.cells.order, d_hidden.to(out.dtype))
