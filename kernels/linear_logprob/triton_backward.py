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

from .cells import TILE, Cells, Entries, Routing, every_cell, list_cells
from .routing import BLOCK
from .tiles import Tile, Tiles, tiles_for
from .triton_cells import (
    _bias_kernel,
    _finish_kernel,
    _hidden_kernel,
    _recompute_kernel,
    _weight_kernel,
)
from .triton_routing import choose, profile_means
from .triton_tile import FUSED, descriptors, inner_contiguous, programs, triton_dtype
from .types import EntropyGrad, Gradients, GradRequest, HeadCall, Saved

WORKSPACE_BYTES = 256 * 2**20
"""Most memory for the cells' G and the tail's rows together."""

STEP = 32
"""Entries that `_weight_kernel` takes at a time, as one step of a product."""
FINISH_COLUMNS, FINISH_STEP = 1024, 8
"""A program's part of a row of dH, and the entries that it takes at a time."""


def backward(
    call: HeadCall, saved: Saved, request: GradRequest, tiles: Tiles | None = None
) -> tuple[Gradients, Tensor]:
    """As `torch_backward.backward`, over cells in place of single pairs.

    Args:
        tiles: in place of the chip's; benchmarks compare them.
    """
    vocabulary, width = call.weight.shape
    outside = (saved.targets < 0) | (saved.targets >= vocabulary)
    saved = saved._replace(targets=saved.targets.masked_fill(outside, -1))
    routing = _route(call, saved, request)
    entropy = request.entropy and request.entropy.scaled(call.logit_scale).at(routing.order)
    launches = Launches.of(call, saved, routing, request.grad * call.logit_scale, entropy)
    launches.tiles = tiles or launches.tiles
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
    weight, entries = launches.weight, launches.entries
    del launches  # the sorted tokens make room for the result, of the same size
    if d_hidden is not None:
        d_hidden = finish_hidden(call, weight, entries, d_hidden, routing.order)
    bias = call.bias
    d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
    return Gradients(d_hidden, d_weight, d_bias), routing.stats


def _route(call: HeadCall, saved: Saved, request: GradRequest) -> Routing:
    grad, scored, tail_eps, *_ = request
    if not tail_eps:
        return every_cell(call, saved, grad, scored, request.entropy)
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
    """The tokens in the order of the routing: hidden [N, H] in the compute dtype; the others [N].

    grad: of the log-probs, times ``logit_scale``.
    """

    hidden: Tensor
    targets: Tensor
    lse: Tensor
    grad: Tensor


def sort_tokens(call: HeadCall, saved: Saved, order: Tensor, grad: Tensor) -> SortedTokens:
    """Args: grad: as `SortedTokens` has it, in the tokens' order."""
    rows = inner_contiguous(call.hidden.to(call.compute_dtype)).index_select(0, order)
    return SortedTokens(rows, saved.targets[order], saved.lse[order], grad[order])


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
    entropy: EntropyGrad | None
    tail: TailGrad | None
    entries: Entries
    cells: Cells
    work: Tensor
    tiles: Tiles

    @classmethod
    def of(
        cls,
        call: HeadCall,
        saved: Saved,
        routing: Routing,
        grad: Tensor,
        entropy: EntropyGrad | None = None,
    ) -> Launches:
        """Args: grad: [N] of the log-probs in the tokens' order, times ``logit_scale``. entropy: of
        the sorted tokens, its gradient times ``logit_scale``."""
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
            entropy=entropy,
            tail=tail,
            entries=routing.entries,
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
        if call.softcap is not None or self.entropy is not None:
            tile = tile_of_long_epilogue(tile)
        _recompute_kernel[self._grid(len(self.work))](
            tokens.hidden, self.weight, self.weight if call.bias is None else call.bias,
            tokens.targets, tokens.lse, tokens.grad, *(self.entropy or (tokens.grad, tokens.grad)),
            cells.cells, cells.slices, self.work,
            *self._described(
                tile, (tokens.hidden, TILE, tile.depth), (self.weight, BLOCK, tile.depth)
            ),
            tokens.hidden.stride(0), self.weight.stride(0), *tokens.hidden.shape,
            len(self.weight), self.token_tiles, piece,
            call.logit_scale, 1.0 if call.softcap is None else call.softcap,
            DEPTH=tile.depth, HAS_BIAS=call.bias is not None,
            HAS_SOFTCAP=call.softcap is not None, ENTROPY=self.entropy is not None,
            **self._constants(), **FUSED, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def write_weight(self, piece: int, d_weight: Tensor) -> None:
        """Write dW of the slice's blocks."""
        tokens, cells, tile = self.tokens, self.cells, self.tiles.d_weight
        vocabulary, width = self.weight.shape
        columns = triton.cdiv(width, tile.columns)
        tail_grad = tokens.grad if self.tail is None else self.tail.weight
        _weight_kernel[self._grid(columns * len(cells.by_count))](
            tokens.hidden, self.work, *self.entries[:3], self.profile, tail_grad, d_weight,
            cells.cells, cells.slices, cells.slice_blocks, cells.by_count, cells.block_bounds,
            *self._described(
                tile, (tokens.hidden, tile.depth, tile.columns), (self.work, tile.depth, BLOCK)
            ),
            tokens.hidden.stride(0), len(tokens.hidden), width, vocabulary,
            self.token_tiles, piece, columns,
            COLUMNS=tile.columns, DEPTH=tile.depth, STEP=STEP, TAIL=self.tail is not None,
            **self._constants(), **FUSED, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def write_bias(self, piece: int, d_bias: Tensor) -> None:
        """Write db of the slice's blocks."""
        cells = self.cells
        tail_bias = self.tokens.grad if self.tail is None else self.tail.bias
        _bias_kernel[self._grid(len(cells.by_count))](
            self.work, *self.entries[:3], self.profile, tail_bias, d_bias,
            cells.slices, cells.slice_blocks, cells.block_bounds, len(self.weight), piece,
            TILE=TILE, BLOCK=BLOCK, TAIL=self.tail is not None, **FUSED, num_warps=8,
        )  # fmt: skip

    def add_hidden(self, piece: int, d_hidden: Tensor) -> None:
        """Add the slice's cells to dH [N, H] of the sorted tokens."""
        cells, tile = self.cells, self.tiles.d_hidden
        tokens, width = d_hidden.shape
        columns = triton.cdiv(width, tile.columns)
        _hidden_kernel[self._grid(columns * self.token_tiles)](
            self.weight, self.work, d_hidden,
            cells.by_tile, cells.tile_blocks, cells.slices, cells.tile_bounds,
            *self._described(
                tile, (self.weight, tile.depth, tile.columns), (self.work, TILE, tile.depth)
            ),
            self.weight.stride(0), tokens, width, len(self.weight),
            self.token_tiles, piece, self.slices, columns,
            COLUMNS=tile.columns, DEPTH=tile.depth, **self._constants(),
            **FUSED, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def _described(self, tile: Tile, *operands: tuple[Tensor, int, int]) -> tuple[Any, ...]:
        """Descriptors of (operand, rows of a block, its columns), or None in place of each."""
        if not tile.descriptors:
            return (None,) * len(operands)
        flat = [(x.view(-1, x.shape[-1]), list(block)) for x, *block in operands]
        return descriptors(self.call.compute_dtype, *flat)

    def _grid(self, units: int) -> tuple[int]:
        return (min(units, programs(self.work.device)),)

    def _constants(self) -> dict[str, Any]:
        return {"TILE": TILE, "BLOCK": BLOCK, "ROUND": triton_dtype(self.call.compute_dtype)}


def finish_hidden(
    call: HeadCall, weight: Tensor, entries: Entries, d_hidden: Tensor, order: Tensor
) -> Tensor:
    """dH [N, H] in the input's dtype and the tokens' order, with the entries' terms.

    Args:
        weight: [V, H], its rows contiguous.
        d_hidden: [N, H] fp32 of the sorted tokens.
    """
    out = torch.empty_like(call.hidden)
    rows = out if out.stride(1) == 1 else out.contiguous()
    tokens, width = out.shape
    if tokens:
        _finish_kernel[(tokens, triton.cdiv(width, FINISH_COLUMNS))](
            d_hidden, *entries[3:], order, weight, rows,
            weight.stride(0), rows.stride(0), width, len(weight),
            COLUMNS=FINISH_COLUMNS, STEP=FINISH_STEP, ROUND=triton_dtype(call.compute_dtype),
            **FUSED, num_warps=4,
        )  # fmt: skip
    return out if rows is out else out.copy_(rows)


def tile_of_long_epilogue(tile: Tile) -> Tile:
    """The recompute's tile with a softcap or the entropy's gradient, which would spill at fewer
    warps."""
    return tile._replace(depth=64, warps=8)


def _cells_that_fit(hidden: Tensor, blocks: int, token_tiles: int) -> int:
    """Cells per slice: the tail's rows [B, H] share the workspace.

    The sorted tokens do not: what backward returns takes their room afterwards.
    """
    cell_bytes = TILE * BLOCK * hidden.element_size()
    room = max(WORKSPACE_BYTES - 8 * blocks * hidden.shape[1], WORKSPACE_BYTES // 4)
    capacity = max(room // cell_bytes, token_tiles + 1)
    return min(capacity, (blocks + 1) * token_tiles + 1)
