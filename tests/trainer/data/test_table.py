"""Data sets that hold token ids already, and the trees of their pairs."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from widemargin.trainer.data import DataSettings, tokenize_pairs
from widemargin.trainer.data.limits import NO_PROMPT_TOKEN
from widemargin.trainer.data.table import (
    REFERENCE_COLUMNS,
    PairLengths,
    PairRows,
    Trees,
    is_tokenized,
)

from tests.support.pair_rows import make_rows
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


def test_tokenized_data_is_recognised_checked_and_cut() -> None:
    raw = Dataset.from_list(make_rows(4))
    pairs, _ = tokenize_pairs(raw, tiny_tokenizer())
    assert is_tokenized(pairs)
    assert not is_tokenized(raw)
    assert not is_tokenized([1, 2])
    again, _ = tokenize_pairs(pairs, tiny_tokenizer())
    assert again[:] == pairs[:]
    ids = Dataset.from_dict(
        {
            "prompt_ids": [[1, 2], [], [1]],
            "chosen_ids": [[4] * 9] * 3,
            "rejected_ids": [[5], [5], [-5]],
        }
    )
    cut, report = tokenize_pairs(ids, tiny_tokenizer(), DataSettings(max_length=5))
    assert cut["chosen_ids"][:] == [[4] * 3]
    assert report.skipped == {NO_PROMPT_TOKEN: 1, "wrong type": 1}


def test_pairs_of_one_prompt_become_a_tree() -> None:
    """By token ids; answers that are scored differently, or by another model, are two leaves."""
    ids = Dataset.from_dict(
        {
            "prompt_ids": [[1, 2], [3], [1, 2], [1, 2]],
            "chosen_ids": [[4, 4], [4, 4], [4, 4], [6]],
            "rejected_ids": [[5], [5], [6], [4, 4]],
        }
    )
    rows = PairRows(ids, group_by_prompt=True)
    assert rows.trees is not None
    assert rows.trees.tree.tolist() == [0, 1, 0, 0]
    assert rows.trees.leaves.tolist() == [[0, 1], [2, 3], [0, 4], [4, 0]]
    assert rows[2]["tree_id"] == 0
    assert rows[2]["leaf_ids"].tolist() == [0, 4]
    assert "tree_id" not in PairRows(ids)[2]
    shuffled = PairRows(ids.select([3, 1, 0]), group_by_prompt=True)
    assert shuffled.trees is not None
    assert shuffled.trees.leaves.tolist() == [[0, 1], [2, 3], [1, 4]]
    partly = ids.add_column("chosen_unscored", [[0], [], [], []])
    leaves = PairRows(partly, group_by_prompt=True).trees.leaves  # pyright: ignore
    assert leaves[0, 0] != leaves[2, 0] == leaves[3, 1]
    logps = ids
    for side, values in zip(REFERENCE_COLUMNS, ([-1.0] * 4, [-2.0, -2.0, -2.0, -1.0]), strict=True):
        logps = logps.add_column(side, values)
    leaves = PairRows(logps, group_by_prompt=True).trees.leaves  # pyright: ignore
    assert leaves[0, 0] == leaves[2, 0] == leaves[3, 1]
    assert leaves[2, 1] != leaves[3, 0]


def test_tokens_of_groups_count_shared_parts_once() -> None:
    trees = Trees(np.array([0, 0, 1]), np.array([[0, 1], [0, 2], [3, 4]]))
    lengths = PairLengths(*np.array([[10, 10, 5], [3, 3, 2], [4, 6, 1]]), trees)  # pyright: ignore
    pairs = np.arange(3)
    together, alone = np.zeros(3, np.int64), pairs
    assert lengths.computed("prefix_shared", pairs, together, 1).tolist() == [10 + 13 + 5 + 3]
    assert lengths.computed("packed", pairs, together, 1).tolist() == [30 + 13 + 10 + 3]
    assert lengths.computed("padded", pairs, together, 1).tolist() == [5 * 16]
    for layout in ("prefix_shared", "packed", "padded"):
        each = lengths.computed(layout, pairs, alone, 3)
        assert each.tolist() == lengths.alone(layout).tolist()
        assert each.sum() == lengths.apart.computed(layout, pairs, alone, 3).sum()
