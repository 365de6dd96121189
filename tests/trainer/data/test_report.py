"""The report of a data set's rows."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from widemargin.trainer.data import DataReport, tokenize_pairs
from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.table import PairRows

from tests.support.pair_rows import make_rows, names
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


def test_bad_rows_are_counted_shown_and_survive_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*make_rows(3), {"prompt": "a", "chosen": "", "rejected": "\x1b[31m"}]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4 + make_rows(1, 3)
    raw = Dataset.from_list(rows)
    pairs, report = tokenize_pairs(raw, tiny_tokenizer(), name="mine")
    assert names(pairs) == [0, 1, 2, 3]
    assert [row["pair_id"] for row in PairRows(pairs).__getitems__(range(4))] == [0, 1, 2, 3]
    assert report.skipped == {"identical sides": 4, "empty completion": 1}
    assert report.examples[0] == "row 3 of mine: empty completion (chosen is empty)"
    lines = DataReport(train=report).lines()
    assert lines[0] == "train: 4 pairs of 9 rows, 5 skipped"
    assert "    ... and 2 more" in lines
    monkeypatch.setattr(PairTokenizer, "__call__", lambda *_: pytest.fail("tokenized"))
    _, cached = tokenize_pairs(raw, tiny_tokenizer(), name="mine")
    assert cached == report
    json.dumps(DataReport(train=report).as_dict())
