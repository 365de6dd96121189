"""The forms a row comes in, and rows that cannot train."""

from __future__ import annotations

import json

import pytest
from widemargin.trainer.data import rows
from widemargin.trainer.data.limits import OK, PROMPT_TWICE

from tests.support.pair_rows import Row, bot, user
from tests.support.tokenized_rows import ASK, NO, SAME_PAIR, YES, ids, text, tokenize


@pytest.mark.parametrize("form", SAME_PAIR)
def test_every_form_of_a_conversation_gives_the_same_tokens(form: str) -> None:
    (row,) = tokenize(SAME_PAIR[form])
    assert (row["status"], row["flags"]) == (OK, set())
    assert [text(part) for part in ids(row)] == [
        "<s><|user|>\nIs water wet?<|end|>\n<|assistant|>\n",
        "yes, it is<|end|>",
        "no<|end|>",
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: wet? A: yes", "Q: wet? A: no", "Q: wet? A:"),
        ("Q: wet? A: maybe yes", "Q: wet? A: mayor", "Q: wet? A:"),
        ("\n\nHuman: wet?\n\nAssistant: It is", "\n\nHuman: wet?\n\nAssistant: It may be",
         "\n\nHuman: wet?\n\nAssistant:"),
    ],
    ids=["word", "inside a word", "transcript"],
)  # fmt: skip
def test_texts_that_share_their_beginning(chosen: str, rejected: str, prompt: str) -> None:
    (row,) = tokenize({"chosen": chosen, "rejected": rejected})
    assert [text(part) for part in ids(row)] == [
        "<s>" + prompt,
        chosen.removeprefix(prompt) + "</s>",
        rejected.removeprefix(prompt) + "</s>",
    ]


BAD_ROWS: list[tuple[str, Row, str]] = [
    ("no prompt", {"prompt": None, "chosen": YES, "rejected": NO}, rows.MISSING),
    ("no chosen", {"prompt": ASK, "chosen": None, "rejected": NO}, rows.MISSING),
    ("no content", {"prompt": ASK, "chosen": [bot(None)], "rejected": NO}, rows.MISSING),
    ("number", {"prompt": ASK, "chosen": 3, "rejected": NO}, rows.WRONG_TYPE),
    ("prompt number", {"prompt": 3, "chosen": "a", "rejected": "b"}, rows.WRONG_TYPE),
    ("numbers", {"prompt": ASK, "chosen": [1, 2], "rejected": NO}, rows.WRONG_TYPE),
    ("no role", {"prompt": ASK, "chosen": [{"content": "x"}], "rejected": NO}, rows.WRONG_TYPE),
    ("content", {"prompt": ASK, "chosen": [bot(3)], "rejected": NO}, rows.WRONG_TYPE),
    ("no messages", {"prompt": ASK, "chosen": [], "rejected": NO}, rows.EMPTY_COMPLETION),
    ("blank", {"prompt": ASK, "chosen": [bot(" \n")], "rejected": NO}, rows.EMPTY_COMPLETION),
    ("empty text", {"prompt": "a", "chosen": "", "rejected": "b"}, rows.EMPTY_COMPLETION),
    ("only eos", {"prompt": "a", "chosen": "</s>", "rejected": "b"}, rows.EMPTY_COMPLETION),
    ("one inside the other", {"chosen": "a b", "rejected": "a b c"}, rows.EMPTY_COMPLETION),
    ("same", {"prompt": ASK, "chosen": YES, "rejected": YES}, rows.IDENTICAL),
    ("same text", {"prompt": "a", "chosen": "b", "rejected": "b"}, rows.IDENTICAL),
    ("same after trim", {"prompt": ASK, "chosen": YES, "rejected": [bot("yes, it is ")]},
     rows.IDENTICAL),
    ("same conversation", {"chosen": ASK + YES, "rejected": ASK + YES}, rows.IDENTICAL),
    ("other questions", {"chosen": ASK + YES, "rejected": [user("?"), *NO]}, rows.NO_SHARED_PROMPT),
    ("other texts", {"chosen": "a", "rejected": "b"}, rows.NO_SHARED_PROMPT),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"), [pytest.param(row, reason, id=name) for name, row, reason in BAD_ROWS]
)
def test_rows_that_cannot_train_have_a_reason(row: Row, reason: str) -> None:
    (done,) = tokenize(row)
    assert (done["status"], ids(done)) == (reason, ([], [], []))


@pytest.mark.parametrize(
    "written", ["[{'role': 'user', 'content': 'wet'", '[{"role": "user", "content": "wet}]']
)
def test_text_that_was_meant_as_messages_is_no_plain_text(written: str) -> None:
    (row,) = tokenize({"prompt": written, "chosen": "yes", "rejected": "no"})
    assert row["status"] == rows.WRONG_TYPE
    assert "neither JSON nor a Python list" in row["detail"]
    code = "{'a': 1}"
    (row,) = tokenize({"prompt": code, "chosen": "{'b': 2", "rejected": "[no"})
    assert row["status"] == OK


def test_what_a_tool_says_before_both_answers_is_the_prompts() -> None:
    tool = {"role": "tool", "content": "It is wet."}
    asked = {"prompt": [*ASK, bot("I look.")], "chosen": [tool, *YES], "rejected": [tool, *NO]}
    (one,), (other,) = (
        tokenize(asked),
        tokenize({**asked, "prompt": [*asked["prompt"], tool], "chosen": YES, "rejected": NO}),
    )
    assert one == other
    assert (one["status"], one["flags"]) == (OK, set())


def test_an_answer_in_json_is_no_message() -> None:
    answers = {"chosen": '{"role": "admin", "name": "Bo"}', "rejected": '{"role": "user"}'}
    (row,) = tokenize({"prompt": ASK, **answers})
    assert [text(part) for part in ids(row)[1:]] == [f"{each}<|end|>" for each in answers.values()]
    (row,) = tokenize({"prompt": ASK, "chosen": json.dumps(bot("yes")), "rejected": "no"})
    assert text(row["chosen_ids"]) == "yes<|end|>"


def test_answers_that_repeat_their_prompt_are_counted() -> None:
    (row,) = tokenize({"prompt": "wet?", "chosen": " wet? yes", "rejected": " wet? no"})
    assert row["flags"] == {PROMPT_TWICE}
    (row,) = tokenize({"prompt": "wet?", "chosen": "wet? yes", "rejected": " no"})
    assert row["flags"] == set()
