"""Pairs cut to their limits, and those that the limits leave nothing of."""

from __future__ import annotations

from widemargin.trainer.data import limits
from widemargin.trainer.data.limits import Limits

from tests.support.tokenized_rows import BOS, ids, tokenize

LONG = {"prompt": "capital of France", "chosen": " yes yes yes no", "rejected": " no no no"}


def test_truncation_keeps_bos_and_the_named_side_then_cuts_completions() -> None:
    (whole,) = tokenize(LONG)
    prompt, chosen, rejected = ids(whole)
    assert (len(prompt), len(chosen), len(rejected)) == (5, 5, 4)
    (row,) = tokenize(LONG, limits=Limits(None, 3, None, "keep_end"))
    assert ids(row) == ([BOS, *prompt[3:]], chosen, rejected)
    assert row["flags"] == {limits.PROMPT_CUT}
    (row,) = tokenize(LONG, limits=Limits(None, 3, None, "keep_start"))
    assert row["prompt_ids"] == prompt[:3]
    (row,) = tokenize(LONG, limits=Limits(None, 1, None, "keep_end"))
    assert row["prompt_ids"] == [BOS]
    (row,) = tokenize(LONG, adds_bos=False, limits=Limits(None, 2, None, "keep_end"))
    assert row["prompt_ids"] == prompt[3:]
    (row,) = tokenize(LONG, limits=Limits(9, None, None, "keep_end"))
    assert ids(row) == (prompt, chosen[:4], rejected)
    assert row["flags"] == {limits.CHOSEN_CUT}
    (row,) = tokenize(LONG, limits=Limits(6, 3, 3, "keep_end"))
    assert [len(part) for part in ids(row)] == [3, 3, 3]
    cut = {limits.PROMPT_CUT, limits.CHOSEN_CUT, limits.REJECTED_CUT}
    assert row["flags"] == cut


def test_limits_that_leave_nothing() -> None:
    (row,) = tokenize(LONG, limits=Limits(4, None, None, "keep_end"))
    assert row["status"] == limits.NOTHING_LEFT
    same_start = {"prompt": "a", "chosen": " yes yes no", "rejected": " yes yes yes"}
    (row,) = tokenize(same_start, limits=Limits(None, None, 2, "keep_end"))
    assert row["status"] == limits.IDENTICAL_CUT
    (row,) = tokenize({"prompt": "", "chosen": "a", "rejected": "b"}, adds_bos=False)
    assert row["status"] == limits.NO_PROMPT_TOKEN
