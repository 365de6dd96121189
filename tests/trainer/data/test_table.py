"""Data sets that hold token ids already."""

from __future__ import annotations

import pytest
from datasets import Dataset
from widemargin.trainer.data import DataSettings, tokenize_pairs
from widemargin.trainer.data.limits import NO_PROMPT_TOKEN
from widemargin.trainer.data.table import is_tokenized

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
