"""Triton backward of the head: routes cells, then launches the kernels of `triton_cells.py`.

Shapes: N tokens (sorted, see `cells.py`), H hidden, V vocabulary, B blocks, T tiles of 128 tokens.
"""

# Triton adds launch options to calls, which type checkers miss.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import triton_routing
from .cells import TILE, list_cells, slice_count
from .routing import BLOCK, num_blocks
from .tiles import tiles_for
from .torch_backward import Gradients, Saved, Wanted
from .torch_forward import Head
from .triton_cells import _bias_kernel, _hidden_kernel, _recompute_kernel, _weight_kernel
from .triton_routing import Routing
from .triton_tile import inner_contiguous, programs, triton_dtype

WORKSPACE_BYTES = 256 * 2**20
"""Most memory for the cells' G, the sorted tokens' hidden states and the tail's rows together."""


def backward(head: Head, saved: Saved, wanted: Wanted) -> tuple[Gradients, Tensor]:
    """As `torch_head_backward.backward`, over cells in place of single pairs."""
    grad, scored, tail_eps = wanted[:3]
    tokens, (vocabulary, width) = len(head.hidden), head.weight.shape
    if tail_eps:
        averaged = saved.profile.numel() > 0
        routing = triton_routing.choose(head, saved, grad, scored, tail_eps, weighted=averaged)
    else:
        routing = triton_routing.everything(num_blocks(vocabulary), scored, saved.lse.dtype)
    grad = grad * head.logit_scale
    launches = Launches(head, saved, routing, grad)
    d_hidden = launches.first_d_hidden() if wanted.hidden else None
    new = head.weight.new_empty
    d_weight = new(vocabulary, width) if wanted.weight else None
    d_bias = new(vocabulary, dtype=torch.float32) if wanted.bias else None
    for piece in range(launches.slices) if tokens else ():
        launches.recompute(piece)
        if d_weight is not None:
            launches.weight(piece, d_weight)
        if d_bias is not None:
            launches.bias(piece, d_bias)
        if d_hidden is not None:
            launches.hidden(piece, d_hidden)
    if not tokens:
        d_weight, d_bias = (None if x is None else x.zero_() for x in (d_weight, d_bias))
    bias = head.bias
    return Gradients(
        None if d_hidden is None else launches.last_d_hidden(d_hidden),
        d_weight,
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    ), routing.stats


class Launches:
    """The launches of one backward pass, over tokens sorted by ``routing.order``.

    Args:
        grad: [N] of the log-probs in the tokens' order, times ``logit_scale``.
    """

    def __init__(self, head: Head, saved: Saved, routing: Routing, grad: Tensor) -> None:
        order, self.head, self.saved, self.routing = routing.order, head, saved, routing
        self.tiles = tiles_for(head.compute_dtype, head.hidden.device)
        own = head.own_coefficients(grad, saved.logps, saved.targets)
        self.grad, self.own = grad[order], own[order]
        self.targets, self.lse = saved.targets[order], saved.lse[order]
        rows = inner_contiguous(head.hidden.to(head.compute_dtype))
        self.hidden_rows = rows.index_select(0, order)
        self.weight_rows = inner_contiguous(head.weight)

        blocks, self.token_tiles = routing.flags.shape
        cell_bytes = TILE * BLOCK * self.hidden_rows.element_size()
        # Rows of the tail's two products, see below, and the sorted tokens' share the workspace.
        others = self.hidden_rows.nbytes + 8 * blocks * self.hidden_rows.shape[1]
        capacity = (WORKSPACE_BYTES - others) // cell_bytes
        capacity = max(capacity, WORKSPACE_BYTES // 4 // cell_bytes, self.token_tiles + 1)
        capacity = min(capacity, (blocks + 1) * self.token_tiles + 1)
        self.slices = slice_count(blocks, self.token_tiles, capacity)
        self.cells = list_cells(routing.flags, capacity)
        self.work = grad.new_empty(capacity, TILE, BLOCK, dtype=head.compute_dtype)
        self.programs = programs(grad.device)

        target_blocks = self.targets // BLOCK
        self.by_target = torch.argsort(target_blocks, stable=True)
        steps = torch.arange(blocks + 1, device=order.device)
        self.target_bounds = torch.searchsorted(target_blocks[self.by_target], steps)
        self.pull = self.pull_bias = self.own
        if routing.weighted is not None:
            self.pull = head.product(routing.weighted, self.hidden_rows)
            self.pull_bias = routing.weighted.sum(1, dtype=torch.float32)
        self.constants = {"TILE": TILE, "BLOCK": BLOCK, "ROUND": triton_dtype(head.compute_dtype)}

    def recompute(self, piece: int) -> None:
        head, cells, tile = self.head, self.cells, self.tiles.recompute
        _recompute_kernel[(min(len(self.work), self.programs),)](
            self.hidden_rows, self.weight_rows,
            self.weight_rows if head.bias is None else head.bias,
            self.targets, self.lse, self.grad, cells.cells, cells.slices, self.work,
            self.hidden_rows.stride(0), self.weight_rows.stride(0), len(self.hidden_rows),
            self.hidden_rows.shape[1], len(self.weight_rows), self.token_tiles, piece,
            head.logit_scale, 1.0 if head.softcap is None else head.softcap,
            DEPTH=tile.depth, HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None, **self.constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def weight(self, piece: int, d_weight: Tensor) -> None:
        cells, tile = self.cells, self.tiles.d_weight
        vocabulary, width = self.weight_rows.shape
        columns = triton.cdiv(width, tile.columns)
        _weight_kernel[(min(columns * len(cells.by_count), self.programs),)](
            self.hidden_rows, self.work, self.own, self.targets, self.by_target,
            self.target_bounds, self.saved.profile, self.pull, d_weight,
            cells.cells, cells.slices, cells.slice_blocks, cells.by_count, cells.block_bounds,
            self.hidden_rows.stride(0), len(self.hidden_rows), width, vocabulary,
            self.token_tiles, piece, columns,
            COLUMNS=tile.columns, DEPTH=tile.depth, TAIL=self.routing.weighted is not None,
            **self.constants, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def bias(self, piece: int, d_bias: Tensor) -> None:
        cells = self.cells
        _bias_kernel[(min(len(cells.by_count), self.programs),)](
            self.work, self.own, self.targets, self.by_target, self.target_bounds,
            self.saved.profile, self.pull_bias, d_bias,
            cells.slices, cells.slice_blocks, cells.block_bounds, len(self.weight_rows), piece,
            TILE=TILE, BLOCK=BLOCK, TAIL=self.routing.weighted is not None, num_warps=8,
        )  # fmt: skip

    def hidden(self, piece: int, d_hidden: Tensor) -> None:
        cells, tile = self.cells, self.tiles.d_hidden
        tokens, width = d_hidden.shape
        columns = triton.cdiv(width, tile.columns)
        _hidden_kernel[(min(columns * self.token_tiles, self.programs),)](
            self.weight_rows, self.work, d_hidden,
            cells.by_tile, cells.tile_blocks, cells.slices, cells.tile_bounds,
            self.weight_rows.stride(0), tokens, width, len(self.weight_rows),
            self.token_tiles, piece, self.slices, columns,
            COLUMNS=tile.columns, DEPTH=tile.depth, **self.constants,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def first_d_hidden(self) -> Tensor:
        """dH [N, H] of the sorted tokens as the tail leaves it, fp32."""
        weighted = self.routing.weighted
        if weighted is None:
            return self.grad.new_zeros(self.hidden_rows.shape)
        means = triton_routing.profile_means(self.head, self.weight_rows, self.saved.profile)
        return self.head.product(weighted.T, means)

    def last_d_hidden(self, d_hidden: Tensor) -> Tensor:
        """Add the targets' own elements; tokens back in their order, in the input's dtype."""
        order, weight = self.routing.order, self.weight_rows
        return triton_routing.finish(
            self.head, d_hidden, self.own, self.saved.targets, order, weight
        )
