"""The order in which the head's Triton kernels work: cells, routing, tiles."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from widemargin.kernels.linear_logprob import cells, routing, tiles, triton_forward, triton_routing
from widemargin.kernels.linear_logprob.types import GradRequest

from bench.head.cells import choose_cells
from tests.support.triton_inputs import DEVICE, inputs_of, saved_forward


def test_lists_of_cells():
    """Every flagged cell is listed once, by block and by tile, within its slice."""
    generator = torch.Generator().manual_seed(0)
    for density in (0.0, 0.2, 1.0):
        flags = torch.rand(23, 5, generator=generator) < density
        for capacity in (6, 9, 200):
            listed = cells.list_cells(flags, capacity)
            count = int(flags.sum())
            pairs = [divmod(cell, 5) for cell in listed.cells[:count].tolist()]
            assert pairs == [tuple(p) for p in flags.nonzero().tolist()]
            slices, slice_blocks = listed.slices.tolist(), listed.slice_blocks.tolist()
            assert slices[0] == slice_blocks[0] == 0
            assert slices[-1] == count
            assert slice_blocks[-1] == 23
            assert max(b - a for a, b in pairwise(slices)) <= capacity
            assert sorted(listed.by_count.tolist()) == list(range(23))
            counts = flags.sum(1).tolist()
            for (first, last), (low, high) in zip(
                pairwise(slice_blocks), pairwise(slices), strict=True
            ):
                mine = listed.by_count[first:last].tolist()
                assert sorted(mine) == list(range(first, last))
                assert [counts[b] for b in mine] == sorted(counts[first:last], reverse=True)
                assert all(low <= int(listed.block_bounds[b]) <= high for b in mine)
            seen = []
            for tile in range(5):
                for piece in range(len(slices) - 1):
                    begin, end = listed.tile_bounds[tile, piece : piece + 2].tolist()
                    mine = listed.by_tile[begin:end].tolist()
                    assert all(pairs[c][1] == tile for c in mine)
                    assert all(slices[piece] <= c < slices[piece + 1] for c in mine)
                    assert mine == sorted(mine)
                    seen += mine
            assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("unscored", [0, 140])
def test_routing_is_that_of_choose_cells(unscored):
    hidden, weight, targets, _, grad = inputs_of(300, 16, 2500, sharp=2.0)
    call, saved = saved_forward(hidden, weight, targets)
    scored = torch.arange(300, device=DEVICE) >= unscored
    grad = torch.where(scored, grad, 0.0).float()
    grad[200] = 0.0
    request = GradRequest(grad, scored, 2**-8, hidden=True, weight=True, bias=False)
    routed, order, flags = choose_cells(saved, request)
    chosen = triton_routing.choose(call, saved, grad, scored, 2**-8, weighted=True)
    assert torch.equal(chosen.flags, flags)
    assert torch.equal(chosen.order, order)
    assert chosen.stats[3] == 0
    assert 0.05 < flags.double().mean() < 0.95
    expected = -(routed.averaged * grad)[:, order]
    tops = torch.zeros_like(routed.tops)
    for place, token in enumerate(order.tolist()):
        first, last = chosen.entries.token_bounds[place : place + 2].tolist()
        rows = chosen.entries.rows[first:last].long()
        tops[rows[rows != targets[token]] // 128, token] = True
    assert torch.equal(tops, routed.tops)
    assert chosen.weighted is not None
    torch.testing.assert_close(chosen.weighted, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        chosen.stats, routing.routing_stats(routed, scored), rtol=1e-5, atol=1e-7
    )


@pytest.mark.costly
def test_every_tile_comes_once_in_any_order():
    """`together` changes the order alone, also where it does not divide the tiles."""
    hidden, weight, targets, _, _ = inputs_of(700, 8, 600)
    call, saved = saved_forward(hidden.detach(), weight.detach(), targets)
    for together in (1, 4, 64):
        tile = tiles.FULL.forward._replace(together=together)
        again = triton_forward.forward_by(
            triton_forward.launch, tile, call, targets, keep=True, profile=True, tops=True
        )
        assert again.extras is saved.extras is None
        assert all(torch.equal(a, b) for a, b in zip(again[:-1], saved[:-1], strict=True))
