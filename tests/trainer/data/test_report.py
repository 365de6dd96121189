"""The report of a data set's rows."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from widemargin.trainer.data import DataReport, tokenize_pairs
from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.limits import SCORES_SWAPPED, UNKNOWN
from widemargin.trainer.data.table import PairRows

from tests.support.pair_rows import Row, bot, make_rows, names, user
from tests.support.tiny_tokenizers import WITH_BOS, tiny_tokenizer

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


def test_rows_and_pairs_are_counted_apart() -> None:
    rows = [
        {"prompt": "a", "completions": ["yes", "no", "no", ""], "scores": [2.0, 1.0, 0.0, -1.0]},
        {"prompt": "a", "completions": ["yes", "yes", "yes"], "scores": [2.0, 1.0, 0.0]},
    ]
    _, report = tokenize_pairs(Dataset.from_list(rows), tiny_tokenizer())
    assert report.skipped == {"identical sides": 2, "empty completion": 1}
    assert next(report.lines()) == "train: 2 pairs of 2 rows, 1 skipped, and 1 pairs of the others"


def test_what_the_first_row_shows_is_noted() -> None:
    talk = {"prompt": [user("a") | {"weight": 0}], "chosen": [bot("b")], "rejected": [bot("c")]}

    def notes(rows: list[Row], template: str | None = WITH_BOS) -> list[str]:
        return tokenize_pairs(Dataset.from_list(rows), tiny_tokenizer(template))[1].sources[0].notes

    assert "the chat template is not used" in notes(make_rows(2))[0]
    assert notes(make_rows(2), None) == []
    assert notes([talk]) == ["nothing reads the fields weight of its messages"]
    assert notes([talk], WITH_BOS + "{# weight #}") == []


def test_swapped_scores_and_unknown_characters_are_counted() -> None:
    rows = [row | {"score_chosen": 1.0, "score_rejected": 2.0} for row in make_rows(1)]
    _, report = tokenize_pairs(Dataset.from_list(rows), tiny_tokenizer())
    assert report.flags == {SCORES_SWAPPED: 1}
    alone = [row | {"score_chosen": -1.0} for row in make_rows(1)]
    assert not tokenize_pairs(Dataset.from_list(alone), tiny_tokenizer())[1].flags
    backend = Tokenizer(
        models.WordLevel({"<unk>": 0, "a": 1, "yes": 2, "no": 3}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="no")
    rows = [{"prompt": "a", "chosen": " yes", "rejected": text} for text in (" no a", " never")]
    _, report = tokenize_pairs(Dataset.from_list(rows), words)
    assert report.flags == {UNKNOWN: 1}
