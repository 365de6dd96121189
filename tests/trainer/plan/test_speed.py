"""Time of a step: bytes that each engine sends."""

from __future__ import annotations

import pytest
from transformers import AutoConfig
from widemargin.trainer.plan.engines import Engine
from widemargin.trainer.plan.shapes import model_size
from widemargin.trainer.plan.speed import traffic

from tests.support.estimates import TINY, settings


def test_bytes_sent_per_step():
    given = settings()
    size = model_size(AutoConfig.for_model(**TINY), given)
    weights = size.total * 2
    assert traffic(size, Engine("zero3"), 1, 2, 4) == 0
    assert traffic(size, Engine("zero3"), 2, 2, 4) == pytest.approx(0.5 * 4 * 3 * weights)
    assert traffic(size, Engine("zero2"), 2, 2, 4) == pytest.approx(0.5 * 5 * weights)
    assert traffic(size, Engine("ddp"), 2, 2, 4) == pytest.approx(0.5 * 2 * size.total * 4)
