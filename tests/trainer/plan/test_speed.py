"""Time of a step: operations of a rank, and bytes that it sends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig
from widemargin.trainer.data.table import PairLengths
from widemargin.trainer.errors import UserError
from widemargin.trainer.plan.chips import Chip
from widemargin.trainer.plan.engines import Engine
from widemargin.trainer.plan.lengths import Lengths
from widemargin.trainer.plan.scenario import Scenario
from widemargin.trainer.plan.shapes import model_size
from widemargin.trainer.plan.speed import exchanged, scaling, speed_of, traffic

from tests.support.estimates import TINY, settings


def scenario(**given: Any) -> Scenario:
    """A run on 4 GPUs of 64 pairs in bfloat16; 32 of them a step where no rows are shared."""
    run = settings(per_device_train_batch_size=8, packing="prefix_shared", bf16=True, **given)
    run.use_cpu = False
    pairs = PairLengths(*(np.full(64, length) for length in (100, 30, 40)))
    engine, config = Engine("zero3"), AutoConfig.for_model(**TINY)
    return Scenario(run, config, run.build_objective(), engine, 4, Lengths(pairs, ""))


def test_bytes_sent_per_step():
    given = settings()
    size = model_size(AutoConfig.for_model(**TINY), given)
    weights = size.total * 2
    assert traffic(size, Engine("zero3"), 1, 2, 4) == 0
    assert traffic(size, Engine("zero3"), 2, 2, 4) == pytest.approx(0.5 * 4 * 3 * weights)
    assert traffic(size, Engine("zero2"), 2, 2, 4) == pytest.approx(0.5 * 5 * weights)
    assert traffic(size, Engine("ddp"), 2, 2, 4) == pytest.approx(0.5 * 2 * size.total * 4)


def test_bytes_sent_around_attention():
    """Of 4 heads and 2 of keys, 8 bfloat16 features each, in 6 layers: forward and backward."""

    def sent(size: int, **given: Any) -> float:
        now = scenario(sequence_parallel_size=size, **given)
        return exchanged(now, tokens=10.0) / (6 * 8 * 2 * 10)

    assert sent(1) == 0
    assert sent(2) == pytest.approx(2 * (4 + 4 + 2 + 2) / 2)
    assert sent(4) == pytest.approx(2 * (4 + 4 + 4 + 4) * 3 / 4)
    assert sent(2, gradient_checkpointing=True) == pytest.approx(3 * 12 / 2)


def test_ranks_that_share_rows_compute_them_together():
    apart, shared = (scenario(sequence_parallel_size=size) for size in (1, 2))
    assert (apart.pairs_per_step, shared.pairs_per_step) == (32, 16)
    assert shared.batch.tokens == pytest.approx(apart.batch.tokens / 2, rel=0.2)
    one, two = (speed_of(now, Chip()) for now in (apart, shared))
    assert two.compute_s == pytest.approx(one.compute_s / 2, rel=0.1)
    assert two.flops == pytest.approx(one.flops / 2, rel=0.1)
    assert [row.ranks for row in scaling(shared, Chip())] == [4, 8, 16, 64, 256]
    with pytest.raises(UserError, match="start a multiple of 3"):
        _ = scenario(sequence_parallel_size=3).packing
