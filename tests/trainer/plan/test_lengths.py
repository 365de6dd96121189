"""Lengths that an estimate assumes where there are no data."""

from __future__ import annotations

import numpy as np
import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.plan.lengths import assumed, at_limits

from tests.support.estimates import settings


def test_assumed_lengths_keep_to_the_limits():
    given = settings(max_length=512, max_prompt_length=100)
    lengths = assumed(given, (90.0, 200.0, 210.0), 20_000)
    longest = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
    assert longest.max() <= 512
    assert lengths.prompt.max() == 100
    assert lengths.chosen.mean() == pytest.approx(200, rel=0.1)
    assert np.corrcoef(lengths.chosen, lengths.rejected)[0, 1] == pytest.approx(0.5, abs=0.1)
    most = at_limits(given, 1)
    assert (most.prompt + most.chosen).tolist() == [512]
    with pytest.raises(UserError, match="max_length"):
        at_limits(settings(max_length=None), 1)
