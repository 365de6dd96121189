"""Text -> token ids: the prompt's boundary, the answers' ends, shared text tokenized once."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from widemargin.trainer.data import guard, limits, rows
from widemargin.trainer.data.encoder import TripleEncoder, cut_mark, encode
from widemargin.trainer.data.formats import converters, messages
from widemargin.trainer.data.limits import OK, Limits
from widemargin.trainer.data.pairs import tokenize_pairs
from widemargin.trainer.data.template import read_chat_template

from tests.support.chat_tokenizers import FAMILIES, family_tokenizer
from tests.support.pair_rows import Row, bot, user
from tests.support.tiny_tokenizers import MERGING, TEMPLATES, WITH_BOS, WITHOUT_END, tiny_tokenizer
from tests.support.tokenized_rows import (
    ASK,
    BOS,
    END,
    EOS,
    NO,
    SAME_PAIR,
    YES,
    ids,
    text,
    tokenize,
)


def test_plain_text_gets_one_bos_and_one_eos() -> None:
    plain = {"prompt": "Is water wet?", "chosen": " yes", "rejected": " no</s>"}
    (row,) = tokenize(plain)
    assert [text(part) for part in ids(row)] == ["<s>Is water wet?", " yes</s>", " no</s>"]
    (row,) = tokenize(plain, adds_bos=False)
    assert text(row["prompt_ids"]) == "Is water wet?"
    assert text(row["rejected_ids"]) == " no</s>"


def test_plain_text_that_no_token_can_end_is_counted() -> None:
    plain = {"prompt": "Is water wet?", "chosen": " yes", "rejected": " no"}
    tokenizer: Any = tiny_tokenizer(None)
    tokenizer.eos_token = None
    _, report = tokenize_pairs(Dataset.from_list([plain]), tokenizer)
    assert {limits.CHOSEN_NO_END, limits.REJECTED_NO_END} <= report.flags.keys()


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
    assert {limits.CHOSEN_NO_END, limits.REJECTED_NO_END} == row["flags"]


def test_nothing_after_the_first_end_token_of_an_answer_is_kept_and_that_is_said() -> None:
    pair = {"prompt": ASK, "chosen": [bot("yes<|end|> it is")], "rejected": NO}
    (row,) = tokenize(pair)
    assert text(row["chosen_ids"]) == "yes<|end|>"
    assert row["flags"] == {limits.AFTER_END}
    (row,) = tokenize({"prompt": ASK, "chosen": [bot("yes<|end|>")], "rejected": NO})
    assert text(row["chosen_ids"]) == "yes<|end|>"
    assert not row["flags"]


def test_a_merge_across_the_prompt_boundary_is_a_mismatch_and_stays_consistent() -> None:
    tokenizer: Any = tiny_tokenizer(MERGING)
    (row,) = tokenize(SAME_PAIR["messages"], template=MERGING)
    assert row["flags"] == {limits.MISMATCH}
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
    assert row["flags"] == {limits.MISMATCH}
    prompt, *sides = ids(row)
    for answer, side in zip((chosen, rejected), sides, strict=True):
        whole: Any = tiny_tokenizer()("no, ye" + answer)["input_ids"]
        assert prompt + side == [*whole, EOS]
    assert text(prompt) == "<s>no,"


def test_bos_is_never_doubled() -> None:
    plain = {"prompt": "<s>Is water wet?", "chosen": " yes", "rejected": " no"}
    (row,) = tokenize(plain)
    assert text(row["prompt_ids"]) == "<s>Is water wet?"
    assert row["flags"] == {limits.BOS_DOUBLED}
    (row,) = tokenize(SAME_PAIR["messages"], template="{{ bos_token }}" + WITH_BOS)
    assert row["prompt_ids"].count(BOS) == 1


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
    for module in (rows, limits, guard, messages, converters)
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
    bounds = Limits(*lengths, mode)
    done = tokenize(
        *(Row(zip(names, row, strict=False)) for row in raw),
        template=TEMPLATES[template],
        limits=bounds,
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
        assert len(prompt) <= (bounds.max_prompt_length or len(prompt))
        for side in (chosen, rejected):
            assert len(side) <= (bounds.max_completion_length or len(side))
            assert len(prompt) + len(side) <= (bounds.max_length or len(prompt + side))
        assert row["max_id"] == max(prompt + chosen + rejected)


TEXT = st.text(st.sampled_from("ab ?\n.▁é"), max_size=6)


PIECES = st.lists(
    st.one_of(
        TEXT,
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|", "|>", "<bos>", "<start_of_turn>",
                         "<s>", "</s>", "[INST]", "<|end|>", "<|user|>", "<|eot_id|>", "yes "]),
    ),
    max_size=6,
).map("".join)  # fmt: skip


def encoder(family: str) -> TripleEncoder:
    if family == "tiny":
        tokenizer = tiny_tokenizer(TEMPLATES["with_bos"])
    elif family.startswith("shipped"):
        tokenizer = family_tokenizer("mistral", read_chat_template(family.split()[1]))
    else:
        tokenizer = family_tokenizer(family)
    probe: Any = tokenizer.apply_chat_template(
        [user("x")], tokenize=False, add_generation_prompt=True
    )
    return TripleEncoder(tokenizer, probe)


@pytest.mark.parametrize("family", [*FAMILIES, "tiny", "shipped mistral", "shipped zephyr"])
def test_a_mark_is_found_where_there_is_one(family: str) -> None:
    marks = {"qwen2.5": "<|im_start|>", "llama3": "<|end_header_id|>", "tiny": "<|assistant|>",
             "gemma2": "<start_of_turn>", "shipped zephyr": "</s>"}  # fmt: skip
    assert encoder(family).mark == marks.get(family, "<s>")


@settings(max_examples=150, deadline=None)
@given(
    texts=st.tuples(PIECES, PIECES, PIECES, PIECES),
    family=st.sampled_from([*FAMILIES, "tiny", "shipped zephyr"]),
    shared=st.booleans(),
)
def test_shared_text_tokenized_once_gives_the_same_ids(
    texts: tuple[str, str, str, str], family: str, shared: bool
) -> None:
    encoded = encoder(family)
    prompt, tail, *sides = texts
    if shared:
        prompt += (encoded.mark or "") + tail
        sides = [prompt + side for side in sides]
    triple = (prompt, sides[0], sides[1])
    plain: Any = encoded.tokenizer(list(triple), add_special_tokens=False)["input_ids"]
    assert encoded([triple, triple]) == [tuple(plain)] * 2


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<m>", special=True, lstrip=True),
        AddedToken("<m>", special=True, normalized=True),
        AddedToken("<m>", special=True, single_word=True),
        AddedToken("m>", special=True),
    ],
    ids=["takes blanks", "normalized", "single word", "begins like a word"],
)
def test_no_cut_before_a_token_that_depends_on_what_precedes_it(token: AddedToken) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    assert cut_mark(tokenizer, f"x {token.content} ?") is None


def test_no_cut_where_another_token_can_reach_over_the_mark() -> None:
    for other in ("<a><", "x<m>y"):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<m>"]})
        assert cut_mark(tokenizer, "x <m> ?") == "<m>"
        tokenizer.add_tokens([other])
        assert cut_mark(tokenizer, "x <m> ?") is None


def test_split_special_tokens_and_a_tokenizer_of_its_own_making_are_left_to_themselves() -> None:
    class Own(type(tiny_tokenizer())):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            found = super().__call__(*args, **kwargs)
            found["input_ids"] = [[*ids, 7] for ids in found["input_ids"]]
            return found

    tokenizer = tiny_tokenizer()
    own = Own(tokenizer_object=tokenizer.backend_tokenizer)
    assert cut_mark(own, "<|user|>") is None
    assert encode(own, ["yes"]) == [[*encode(tokenizer, ["yes"])[0], 7]]
    split = tiny_tokenizer()
    split.split_special_tokens = True
    assert cut_mark(split, "<|user|>") is None
    assert len(encode(split, ["<|end|>"])[0]) > 1
