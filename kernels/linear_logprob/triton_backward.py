"""Triton backward of the head: routes cells, then launches the kernels of `triton_cells.py`.

Shapes: N tokens (sorted, see `cells.py`), H hidden, V vocabulary, B blocks, T tiles of 128 tokens.
"""

# Triton adds launch options to calls, which type checkers miss.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .cells import TILE, Cells, list_cells
from .routing import BLOCK, num_blocks, target_grads
from .tiles import Tiles, tiles_for
from .triton_cells import _bias_kernel, _hidden_kernel, _recompute_kernel, _weight_kernel
from .triton_routing import Routing, choose, every_cell, finish, profile_means
from .triton_tile import inner_contiguous, programs, triton_dtype
from .types import Gradients, GradRequest, HeadCall, Saved

WORKSPACE_BYTES = 256 * 2**20
"""Most memory for the cells' G, the sorted tokens' hidden states and the tail's rows together."""


def backward(call: HeadCall, saved: Saved, request: GradRequest) -> tuple[Gradients, Tensor]:
    """As `torch_backward.backward`, over cells in place of single pairs."""
    vocabulary, width = call.weight.shape
    routing = _route(call, saved, request)
    launches = Launches.of(call, saved, routing, request.grad * call.logit_scale)
    new = call.weight.new_empty
    d_hidden = _tail_of_hidden(call, saved, launches, routing) if request.hidden else None
    d_weight = new(vocabulary, width) if request.weight else None
    d_bias = new(vocabulary, dtype=torch.float32) if request.bias else None
    for piece in range(launches.slices) if len(call.hidden) else ():
        launches.recompute(piece)
        if d_weight is not None:
            launches.write_weight(piece, d_weight)
        if d_bias is not None:
            launches.write_bias(piece, d_bias)
        if d_hidden is not None:
            launches.add_hidden(piece, d_hidden)
    if not len(call.hidden):
        d_weight, d_bias = (None if x is None else x.zero_() for x in (d_weight, d_bias))
    if d_hidden is not None:
        rows, grads = launches.weight, launches.tokens.target_grad
        d_hidden = finish(call, d_hidden, grads, saved.targets, routing.order, rows)
    bias = call.bias
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return Gradients(d_hidden, d_weight, d_bias), routing.stats


def _route(call: HeadCall, saved: Saved, request: GradRequest) -> Routing:
    grad, scored, tail_eps, *_ = request
    if not tail_eps:
        return every_cell(num_blocks(len(call.weight)), scored, saved.lse.dtype)
    return choose(call, saved, grad, scored, tail_eps, weighted=saved.profile.numel() > 0)


def _tail_of_hidden(call: HeadCall, saved: Saved, launches: Launches, routing: Routing) -> Tensor:
    """dH [N, H] of the sorted tokens as the tail leaves it, fp32."""
    if routing.weighted is None:
        return launches.tokens.grad.new_zeros(launches.tokens.hidden.shape)
    means = profile_means(call, launches.weight, saved.profile)
    return _fp32_product(routing.weighted.T, means)


def _fp32_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in fp32, whatever their dtype."""
    if left.dtype == torch.float32:
        return left @ right
    return torch.mm(left, right, out_dtype=torch.float32)


class SortedTokens(NamedTuple):
    """The tokens in the order of the routing.

    hidden: [N, H] in the compute dtype. targets, lse, grad, target_grad: [N]. by_target: [N], their
    places, sorted by their targets' blocks. target_bounds: [B + 1], where each block begins there.
    """

    hidden: Tensor
    targets: Tensor
    lse: Tensor
    grad: Tensor
    target_grad: Tensor
    by_target: Tensor
    target_bounds: Tensor


def sort_tokens(call: HeadCall, saved: Saved, order: Tensor, grad: Tensor) -> SortedTokens:
    """Args: grad: [N] of the log-probs in the tokens' order, times ``logit_scale``."""
    target_grad = target_grads(call, grad, saved.logps, saved.targets)
    rows = inner_contiguous(call.hidden.to(call.compute_dtype))
    targets = saved.targets[order]
    blocks = targets // BLOCK
    by_target = torch.argsort(blocks, stable=True)
    steps = torch.arange(num_blocks(len(call.weight)) + 1, device=order.device)
    return SortedTokens(
        hidden=rows.index_select(0, order),
        targets=targets,
        lse=saved.lse[order],
        grad=grad[order],
        target_grad=target_grad[order],
        by_target=by_target,
        target_bounds=torch.searchsorted(blocks[by_target], steps),
    )


class TailGrad(NamedTuple):
    """The tail's share of each block, to be spread by the profile. weight: [B, H]. bias: [B]."""

    weight: Tensor
    bias: Tensor


@dataclass
class Launches:
    """The launches of one backward pass, a slice of the cells (``piece``) at a time.

    weight: [V, H], its rows contiguous. profile: [V] or empty. work: [cells of a slice, TILE,
    BLOCK]. tail: None without one.
    """

    call: HeadCall
    weight: Tensor
    profile: Tensor
    tokens: SortedTokens
    tail: TailGrad | None
    cells: Cells
    work: Tensor
    tiles: Tiles

    @classmethod
    def of(cls, call: HeadCall, saved: Saved, routing: Routing, grad: Tensor) -> Launches:
        """Args: grad: [N] of the log-probs in the tokens' order, times ``logit_scale``."""
        tokens = sort_tokens(call, saved, routing.order, grad)
        capacity = _cells_that_fit(tokens.hidden, *routing.flags.shape)
        tail = None
        if routing.weighted is not None:
            d_weight = _fp32_product(routing.weighted, tokens.hidden)
            tail = TailGrad(d_weight, routing.weighted.sum(1, dtype=torch.float32))
        return cls(
            call=call,
            weight=inner_contiguous(call.weight),
            profile=saved.profile,
            tokens=tokens,
            tail=tail,
            cells=list_cells(routing.flags, capacity),
            work=grad.new_empty(capacity, TILE, BLOCK, dtype=call.compute_dtype),
            tiles=tiles_for(call.compute_dtype, call.hidden.device),
        )

    @property
    def slices(self) -> int:
        return len(self.cells.slices) - 1

    @property
    def token_tiles(self) -> int:
        return len(self.cells.tile_bounds)

    def recompute(self, piece: int) -> None:
        """Write G of the slice's cells to ``work``."""
        call, tokens, cells, tile = self.call, self.tokens, self.cells, self.tiles.recompute
        _recompute_kernel[self._grid(len(self.work))](
            tokens.hidden, self.weight, self.weight if call.bias is None else call.bias,
            tokens.targets, tokens.lse, tokens.grad, cells.cells, cells.slices, self.work,
            tokens.hidden.stride(0), self.weight.stride(0), *tokens.hidden.shape,
            len(self.weight), self.token_tiles, piece,
            call.logit_scale, 1.0 if call.softcap is None else call.softcap,
            DEPTH=tile.depth, HAS_BIAS=call.bias is not None,
            HAS_SOFTCAP=call.softcap is not None, **self._constants(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def write_weight(self, piece: int, d_weight: Tensor) -> None:
        """Write dW of the slice's blocks."""
        tokens, cells, tile = self.tokens, self.cells, self.tiles.d_weight
        vocabulary, width = self.weight.shape
        columns = triton.cdiv(width, tile.columns)
        tail_grad = tokens.target_grad if self.tail is None else self.tail.weight
        _weight_kernel[self._grid(columns * len(cells.by_count))](
            tokens.hidden, self.work, tokens.target_grad, tokens.targets, tokens.by_target,
            tokens.target_bounds, self.profile, tail_grad, d_weight,
            cells.cells, cells.slices, cells.slice_blocks, cells.by_count, cells.block_bounds,
            tokens.hidden.stride(0), len(tokens.hidden), width, vocabulary,
            self.token_tiles, piece, columns,
            COLUMNS=tile.columns, DEPTH=tile.depth, TAIL=self.tail is not None,
            **self._constants(), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def write_bias(self, piece: int, d_bias: Tensor) -> None:
        """Write db of the slice's blocks."""
        tokens, cells = self.tokens, self.cells
        tail_bias = tokens.target_grad if self.tail is None else self.tail.bias
        _bias_kernel[self._grid(len(cells.by_count))](
            self.work, tokens.target_grad, tokens.targets, tokens.by_target, tokens.target_bounds,
            self.profile, tail_bias, d_bias,
            cells.slices, cells.slice_blocks, cells.block_bounds, len(self.weight), piece,
            TILE=TILE, BLOCK=BLOCK, TAIL=self.tail is not None, num_warps=8,
        )  # fmt: skip

    def add_hidden(self, piece: int, d_hidden: Tensor) -> None:
        """Add the slice's cells to dH [N, H] of the sorted tokens."""
        cells, tile = self.cells, self.tiles.d_hidden
        tokens, width = d_hidden.shape
        columns = triton.cdiv(width, tile.columns)
        _hidden_kernel[self._grid(columns * self.token_tiles)](
            self.weight, self.work, d_hidden,
            cells.by_tile, cells.tile_blocks, cells.slices, cells.tile_bounds,
            self.weight.stride(0), tokens, width, len(self.weight),
            self.token_tiles, piece, self.slices, columns,
            COLUMNS=tile.columns, DEPTH=tile.depth, **self._constants(),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def _grid(self, units: int) -> tuple[int]:
        return (min(units, programs(self.work.device)),)

    def _constants(self) -> dict[str, Any]:
        return {"TILE": TILE, "BLOCK": BLOCK, "ROUND": triton_dtype(self.call.compute_dtype)}


def _cells_that_fit(hidden: Tensor, blocks: int, token_tiles: int) -> int:
    """Cells per slice: the tail's rows [B, H] and the sorted tokens share the workspace."""
    cell_bytes = TILE * BLOCK * hidden.element_size()
    others = hidden.nbytes + 8 * blocks * hidden.shape[1]
    capacity = (WORKSPACE_BYTES - others) // cell_bytes
    capacity = max(capacity, WORKSPACE_BYTES // 4 // cell_bytes, token_tiles + 1)
    return min(capacity, (blocks + 1) * token_tiles + 1)
