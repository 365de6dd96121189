"""Where segments go: dense rows, and the lengths of single rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.packing.layout import dense_cost, place_dense, row_length


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=9), cost=st.floats(1e-6, 1.0))
def test_dense_rows_hold_every_segment_once_and_cost_least(lengths: list[int], cost: float) -> None:
    sizes = np.array(lengths)
    begins, (count, width) = place_dense(sizes, cost)
    filled = np.zeros(count * width, int)
    for begin, size in zip(begins, sizes, strict=True):
        assert begin // width == (begin + size - 1) // width
        filled[begin : begin + size] += 1
    assert filled.max() == 1
    price = count * width * (1 + cost * width)
    assert price == dense_cost(sizes, cost)
    one, all_alone = sizes.sum(), len(sizes) * sizes.max()
    assert price <= min(one * (1 + cost * one), all_alone * (1 + cost * sizes.max())) + 1e-9


def test_lengths_of_single_rows_are_few() -> None:
    lengths = sorted({row_length(tokens) for tokens in range(1, 40_000, 7)})
    assert all(length % 128 == 0 for length in lengths)
    assert all(b <= max(1.25 * a, a + 128) for a, b in pairwise(lengths))
    assert len({row_length(tokens, 4096) for tokens in range(1, 16_384)}) <= 8
