"""Rows -> tokens: formats, templates, the prompt boundary, truncation, rows that cannot train."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.data import limits as fitting
from widemargin.trainer.data import rows
from widemargin.trainer.data.limits import FLAGS, OK, Limits
from widemargin.trainer.data.tokenizing import PairTokenizer
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import Row, bot, user
from tests.support.tiny_tokenizers import MERGING, TEMPLATES, WITH_BOS, WITHOUT_END, tiny_tokenizer

LOOSE = Limits(None, None, None, "keep_end")
BOS, EOS, END = 0, 1, 3


ASK = [user("Is water wet?")]
YES, NO = [bot("yes, it is")], [bot("no")]


def tokenize(
    *raw: Row, template: str | None = WITH_BOS, limits: Limits = LOOSE, adds_bos: bool = True
) -> list[Row]:
    tokenizer = tiny_tokenizer(template, adds_bos)
    columns = PairTokenizer(tokenizer, limits)(
        {name: [row[name] for row in raw] for name in raw[0]}
    )
    done = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return [
        row | {"flags": {f for i, f in enumerate(FLAGS) if row["flags"] >> i & 1}} for row in done
    ]


def ids(row: Row) -> tuple[list[int], list[int], list[int]]:
    return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]


def text(token_ids: list[int]) -> str:
    return str(tiny_tokenizer().decode(token_ids))


SAME_PAIR: dict[str, Row] = {
    "messages": {"prompt": ASK, "chosen": YES, "rejected": NO},
    "whole conversations after a prompt of messages": {
        "prompt": ASK,
        "chosen": ASK + YES,
        "rejected": ASK + NO,
    },
    "whole conversations after a text (UltraFeedback)": {
        "prompt": "Is water wet?",
        "chosen": ASK + YES,
        "rejected": ASK + NO,
    },
    "implicit prompt": {"chosen": ASK + YES, "rejected": ASK + NO},
    "empty prompt": {"prompt": [], "chosen": ASK + YES, "rejected": ASK + NO},
    "prompt text with answer messages": {"prompt": "Is water wet?", "chosen": YES, "rejected": NO},
    "prompt messages with answer texts": {"prompt": ASK, "chosen": "yes, it is", "rejected": "no"},
    "messages with empty fields, as Arrow fills them": {
        "prompt": [{**ASK[0], "tool_calls": None}],
        "chosen": [{**YES[0], "tool_calls": None}],
        "rejected": NO,
    },
}


@pytest.mark.parametrize("form", SAME_PAIR)
def test_every_form_of_a_conversation_gives_the_same_tokens(form: str) -> None:
    (row,) = tokenize(SAME_PAIR[form])
    assert (row["status"], row["flags"]) == (OK, set())
    assert [text(part) for part in ids(row)] == [
        "<s><|user|>\nIs water wet?<|end|>\n<|assistant|>\n",
        "yes, it is<|end|>",
        "no<|end|>",
    ]


def test_plain_text_gets_one_bos_and_one_eos() -> None:
    plain = {"prompt": "Is water wet?", "chosen": " yes", "rejected": " no</s>"}
    (row,) = tokenize(plain)
    assert [text(part) for part in ids(row)] == ["<s>Is water wet?", " yes</s>", " no</s>"]
    (row,) = tokenize(plain, adds_bos=False)
    assert text(row["prompt_ids"]) == "Is water wet?"
    assert text(row["rejected_ids"]) == " no</s>"


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


@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_are_those_of_the_whole_conversation(template: str) -> None:
    tokenizer: Any = tiny_tokenizer(TEMPLATES[template])
    history = [user("What is the capital of France?"), bot("Paris"), *ASK]
    (row,) = tokenize(
        {"prompt": history, "chosen": YES, "rejected": NO}, template=TEMPLATES[template]
    )
    assert row["status"] == OK
    for side, answer in (("chosen_ids", YES), ("rejected_ids", NO)):
        whole = tokenizer.apply_chat_template(history + answer, return_dict=False)
        ours = row["prompt_ids"] + row[side]
        assert ours == whole[: len(ours)]
        assert tokenizer.decode(whole[len(ours) :]).strip() == ""
        if template != "without_end":
            assert ours[-1] in (EOS, END)
    assert row["prompt_ids"].count(BOS) == (1 if "bos_token" in TEMPLATES[template] else 0)


def test_a_template_without_an_end_of_turn_is_counted() -> None:
    (row,) = tokenize(SAME_PAIR["messages"], template=WITHOUT_END)
    assert {fitting.CHOSEN_NO_END, fitting.REJECTED_NO_END} == row["flags"]


def test_an_end_token_inside_an_answer_does_not_end_it() -> None:
    pair = {"prompt": ASK, "chosen": [bot("yes<|end|> it is")], "rejected": NO}
    (row,) = tokenize(pair)
    assert text(row["chosen_ids"]) == "yes<|end|> it is<|end|>"


def test_a_merge_across_the_prompt_boundary_is_a_mismatch_and_stays_consistent() -> None:
    tokenizer: Any = tiny_tokenizer(MERGING)
    (row,) = tokenize(SAME_PAIR["messages"], template=MERGING)
    assert row["flags"] == {fitting.MISMATCH}
    assert "1 of 12 prompt tokens" in row["detail"]
    rendered = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    assert row["prompt_ids"] == rendered[:-1]
    assert text(row["chosen_ids"]) == " yes, it is</s>"
    assert (
        text(row["prompt_ids"] + row["rejected_ids"]) == "<s>User: Is water wet?\nAssistant: no</s>"
    )


@pytest.mark.parametrize(("chosen", "rejected"), [("s", " no"), (" no", "s")])
def test_a_merge_with_one_side_only_still_gives_both_sides_one_prompt(
    chosen: str, rejected: str
) -> None:
    (row,) = tokenize({"prompt": "no, ye", "chosen": chosen, "rejected": rejected})
    assert row["flags"] == {fitting.MISMATCH}
    prompt, *sides = ids(row)
    for answer, side in zip((chosen, rejected), sides, strict=True):
        whole: Any = tiny_tokenizer()("no, ye" + answer)["input_ids"]
        assert prompt + side == [*whole, EOS]
    assert text(prompt) == "<s>no,"


def test_bos_is_never_doubled() -> None:
    plain = {"prompt": "<s>Is water wet?", "chosen": " yes", "rejected": " no"}
    (row,) = tokenize(plain)
    assert text(row["prompt_ids"]) == "<s>Is water wet?"
    assert row["flags"] == {fitting.BOS_DOUBLED}
    (row,) = tokenize(SAME_PAIR["messages"], template="{{ bos_token }}" + WITH_BOS)
    assert row["prompt_ids"].count(BOS) == 1


def test_a_row_the_template_refuses_leaves_the_others() -> None:
    system = {"role": "system", "content": "Be brief."}
    refused = {"prompt": [system, *ASK], "chosen": YES, "rejected": NO}
    good, bad = tokenize(SAME_PAIR["messages"], refused, template=TEMPLATES["no_system"])
    assert good["status"] == OK
    assert bad["status"] == "refused by the chat template"
    assert "System role not supported" in bad["detail"]


def test_messages_without_a_template_are_an_error_with_advice() -> None:
    with pytest.raises(UserError, match="set chat_template:"):
        tokenize(SAME_PAIR["messages"], template=None)


LONG = {"prompt": "capital of France", "chosen": " yes yes yes no", "rejected": " no no no"}


def test_truncation_keeps_bos_and_the_named_side_then_cuts_completions() -> None:
    (whole,) = tokenize(LONG)
    prompt, chosen, rejected = ids(whole)
    assert (len(prompt), len(chosen), len(rejected)) == (5, 5, 4)
    (row,) = tokenize(LONG, limits=Limits(None, 3, None, "keep_end"))
    assert ids(row) == ([BOS, *prompt[3:]], chosen, rejected)
    assert row["flags"] == {fitting.PROMPT_CUT}
    (row,) = tokenize(LONG, limits=Limits(None, 3, None, "keep_start"))
    assert row["prompt_ids"] == prompt[:3]
    (row,) = tokenize(LONG, limits=Limits(None, 1, None, "keep_end"))
    assert row["prompt_ids"] == [BOS]
    (row,) = tokenize(LONG, adds_bos=False, limits=Limits(None, 2, None, "keep_end"))
    assert row["prompt_ids"] == prompt[3:]
    (row,) = tokenize(LONG, limits=Limits(9, None, None, "keep_end"))
    assert ids(row) == (prompt, chosen[:4], rejected)
    assert row["flags"] == {fitting.CHOSEN_CUT}
    (row,) = tokenize(LONG, limits=Limits(6, 3, 3, "keep_end"))
    assert [len(part) for part in ids(row)] == [3, 3, 3]
    cut = {fitting.PROMPT_CUT, fitting.CHOSEN_CUT, fitting.REJECTED_CUT}
    assert row["flags"] == cut


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


def test_limits_that_leave_nothing() -> None:
    (row,) = tokenize(LONG, limits=Limits(4, None, None, "keep_end"))
    assert row["status"] == fitting.NOTHING_LEFT
    same_start = {"prompt": "a", "chosen": " yes yes no", "rejected": " yes yes yes"}
    (row,) = tokenize(same_start, limits=Limits(None, None, 2, "keep_end"))
    assert row["status"] == fitting.IDENTICAL_CUT
    (row,) = tokenize({"prompt": "", "chosen": "a", "rejected": "b"}, adds_bos=False)
    assert row["status"] == fitting.NO_PROMPT_TOKEN


TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", " ", "yes", "<s>", "</s>", "<|end|>", " no", "yes\n"]),
)
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXTS}
        ),
        st.dictionaries(st.sampled_from(["role", "content"]), st.none() | st.integers() | TEXTS),
        st.integers(),
    ),
    max_size=4,
)
VALUES = st.one_of(st.none(), TEXTS, MESSAGES, st.integers(), st.booleans())
SIDES = st.one_of(TEXTS, MESSAGES, VALUES)
REASONS = {
    value
    for module in (rows, fitting)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str)
} | {"refused by the chat template"}


@settings(max_examples=300, deadline=None)
@given(
    raw=st.lists(st.tuples(SIDES, SIDES, SIDES), min_size=1, max_size=4),
    prompts=st.booleans(),
    template=st.sampled_from(sorted(TEMPLATES)),
    lengths=st.tuples(*[st.none() | st.integers(1, 20)] * 3),
    mode=st.sampled_from(["keep_end", "keep_start"]),
)
def test_any_row_is_fine_or_has_one_of_our_reasons(
    raw: list[tuple[Any, Any, Any]],
    prompts: bool,
    template: str,
    lengths: tuple[int | None, int | None, int | None],
    mode: str,
) -> None:
    names: tuple[str, ...] = ("chosen", "rejected", "prompt")[: 3 if prompts else 2]
    limits = Limits(*lengths, mode)
    done = tokenize(
        *(Row(zip(names, row, strict=False)) for row in raw),
        template=TEMPLATES[template],
        limits=limits,
    )
    assert len(done) == len(raw)
    for row in done:
        prompt, chosen, rejected = ids(row)
        assert row["status"] in REASONS
        if row["status"] != OK:
            assert not prompt + chosen + rejected
            continue
        assert prompt
        assert chosen
        assert rejected
        assert chosen != rejected
        assert prompt[:2] != [BOS, BOS]
        assert len(prompt) <= (limits.max_prompt_length or len(prompt))
        for side in (chosen, rejected):
            assert len(side) <= (limits.max_completion_length or len(side))
            assert len(prompt) + len(side) <= (limits.max_length or len(prompt + side))
        assert row["max_id"] == max(prompt + chosen + rejected)
