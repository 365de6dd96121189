"""Neighbours whose answers change places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from widemargin.trainer.data.table.mismatched import (
    exchanged,
    neighbours,
    with_exchanged,
)
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


def row(tree: int, answer: int, neighbours_leaf: int) -> dict[str, Any]:
    return {
        "prompt_ids": [tree], "chosen_ids": [answer], "rejected_ids": [answer], "tree_id": tree,
        "leaf_ids": [answer] * 2, "mismatched_ids": [3, 4], "mismatched_leaf": neighbours_leaf,
    }  # fmt: skip


def test_exchanged_rows_hold_the_neighbours_answer():
    (made,) = exchanged([row(1, 2, 7)])
    assert made["prompt_ids"] == [1]
    assert made["chosen_ids"] == made["rejected_ids"] == [3, 4]
    assert "chosen_unscored" not in made
    (made,) = exchanged([row(1, 2, 7) | {"mismatched_unscored": [0]}])
    assert made["chosen_unscored"] == made["rejected_unscored"] == [0]


def test_rows_of_one_prompt_share_it_and_the_neighbour_they_have_in_common():
    rows = [row(0, 0, 9), row(0, 1, 9), row(0, 2, 8), row(5, 3, 9)]
    made = exchanged(rows)
    assert [each["tree_id"] for each in made] == [0, 0, 0, 5]
    leaves = [each["leaf_ids"][0] for each in made]
    assert leaves[0] == leaves[1]
    assert len(set(leaves)) == 3
    both = with_exchanged(rows)
    assert [each["leaf_ids"][0] for each in both] == [0, 1, 2, 3, *leaves]
    assert all(each.keys() == both[0].keys() for each in both)
