"""The head's memory as simulations count it, against the design's bound."""

from __future__ import annotations

import pytest
from widemargin.trainer.plan.stand_in import head_backward, head_bound, head_forward


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 300), (8190, 128256), (100_000, 256_000)])
def test_the_heads_memory_is_within_its_bound(tokens, vocab):
    blocks = -(-vocab // 128)
    kept = tokens * blocks * 4
    most = head_bound(tokens, 4096, vocab)
    assert kept + head_backward(tokens, 4096, vocab, 2, "triton") <= most
    assert head_forward(tokens, 4096, vocab, 2, "triton") <= tokens * vocab * 4
