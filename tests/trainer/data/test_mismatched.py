"""Neighbours whose answers change places."""

from __future__ import annotations

import numpy as np
import pytest
from widemargin.trainer.data.table.mismatched import exchanged, neighbours
from widemargin.trainer.errors import UserError


def test_answers_rotate_in_the_order_of_the_data():
    """As in TRL where every prompt is another, whatever order a batch comes in."""
    prompts = np.arange(9)
    assert neighbours([3, 8, 1, 5], prompts) == {1: 8, 3: 1, 5: 3, 8: 5}
    assert neighbours([5, 1, 8, 3], prompts) == {1: 8, 3: 1, 5: 3, 8: 5}


def test_no_neighbour_answers_the_same_prompt():
    prompts = np.array([0, 0, 1, 1, 1, 2])
    found = neighbours(range(6), prompts)
    assert found == {0: 5, 1: 5, 2: 1, 3: 1, 4: 1, 5: 4}
    assert neighbours([3, 4], prompts) == {3: 1, 4: 1}, "none in the batch: of the data set"
    assert neighbours([0], prompts) == {0: 5}
    with pytest.raises(UserError, match="kl_estimate: set it to batch"):
        neighbours([0, 1], np.zeros(4, int))


def test_exchanged_rows_hold_the_neighbours_answer():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2], "mismatched_ids": [3, 4]}]
    (row,) = exchanged(rows)
    assert row["prompt_ids"] == [1]
    assert row["chosen_ids"] == row["rejected_ids"] == [3, 4]
    assert "chosen_unscored" not in row
    (row,) = exchanged([rows[0] | {"mismatched_unscored": [0]}])
    assert row["chosen_unscored"] == row["rejected_unscored"] == [0]
