"""Conversations render to the ids of the tokenizer's own `apply_chat_template`, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from widemargin.trainer.data.chat import Rendering, read_chat_template
from widemargin.trainer.data.encoding import TripleEncoder, cut_mark, encode
from widemargin.trainer.data.limits import FLAGS, OK, Limits
from widemargin.trainer.data.tokenizing import PairTokenizer
from widemargin.trainer.errors import UserError

from tests.support.chat_tokenizers import FAMILIES, MISTRAL, family_tokenizer
from tests.support.pair_rows import Row, bot, user
from tests.support.tiny_tokenizers import TEMPLATES, tiny_tokenizer

LOOSE = Limits(None, None, None, "keep_end")


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def tokenize(tokenizer: Any, row: Row, **rendering: bool) -> Row:
    columns = PairTokenizer(tokenizer, LOOSE, Rendering(**rendering))({k: [row[k]] for k in row})
    done = {name: values[0] for name, values in columns.items()}
    return done | {"flags": {flag for i, flag in enumerate(FLAGS) if done["flags"] >> i & 1}}


ASK = [user("Is water wet?")]
TURNS = [user("What is the capital of France?"), bot("Paris."), *ASK]
YES, NO = [bot("Yes, it is.")], [bot("No\n\nmaybe")]


@pytest.mark.parametrize("prompt", [ASK, TURNS, [system("Answer briefly."), *TURNS]],
                         ids=["one question", "several turns", "system"])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_whole_conversation(family: str, prompt: list[Row]) -> None:
    tokenizer: Any = family_tokenizer(family)
    row = tokenize(tokenizer, {"prompt": prompt, "chosen": YES, "rejected": NO})
    if prompt[0]["role"] == "system" and family not in ("qwen2.5", "llama3"):
        assert row["status"] == "refused by the chat template"
        return
    assert (row["status"], row["flags"]) == (OK, set())
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert row["prompt_ids"] == asked
    for side, answer in (("chosen_ids", YES), ("rejected_ids", NO)):
        whole = tokenizer.apply_chat_template(prompt + answer, return_dict=False)
        ours = row["prompt_ids"] + row[side]
        assert ours == whole[: len(ours)]
        assert tokenizer.decode(whole[len(ours) :]).strip() == ""
    end = "<end_of_turn>" if family == "gemma2" else tokenizer.eos_token
    assert row["chosen_ids"][-1] == tokenizer.convert_tokens_to_ids(end)
    bos = tokenizer.bos_token_id
    assert bos is None or row["prompt_ids"].count(bos) == 1


def test_a_default_system_prompt_is_kept_or_left_out_as_told() -> None:
    tokenizer: Any = family_tokenizer("qwen2.5")
    pair = {"prompt": ASK, "chosen": YES, "rejected": NO}
    ours = tokenizer.decode(tokenize(tokenizer, pair)["prompt_ids"])
    assert ours.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    bare = tokenizer.decode(tokenize(tokenizer, pair, empty_system=True)["prompt_ids"])
    assert bare.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")
    own = {**pair, "prompt": [system("Be brief."), *ASK]}
    assert tokenize(tokenizer, own) == tokenize(tokenizer, own, empty_system=True)


@pytest.mark.parametrize("family", ["gemma2", "mistral", "llama3"])
def test_no_empty_system_message_where_there_is_no_place_for_one(family: str) -> None:
    pair = {"prompt": ASK, "chosen": YES, "rejected": NO}
    tokenizer = family_tokenizer(family)
    assert tokenize(tokenizer, pair) == tokenize(tokenizer, pair, empty_system=True)


def test_shipped_mistral_template() -> None:
    tokenizer: Any = family_tokenizer("mistral", read_chat_template("mistral"))

    def text(*messages: Row) -> str:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)

    assert text(user(" a "), bot(" b "), user("c")) == "<s>[INST] a [/INST] b </s>[INST] c [/INST]"
    assert text(system(" s "), user(" a ")) == "<s>[INST] s\n\n a [/INST]"
    assert text(system(""), user("a")) == text(user("a")) == "<s>[INST] a [/INST]"
    assert text(bot("b")) == "<s> b </s>"
    with pytest.raises(Exception, match="mistral template"):
        text(user("a"), {"role": "tool", "content": "b"})


def test_shipped_zephyr_template() -> None:
    tokenizer: Any = family_tokenizer("mistral", read_chat_template("zephyr"))
    asked = tokenizer.apply_chat_template(
        [system(""), user("a")], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<s><|system|>\n</s>\n<|user|>\na</s>\n<|assistant|>\n"
    whole = tokenizer.apply_chat_template([user("a"), bot("b")], tokenize=False)
    assert whole == "<s><|user|>\na</s>\n<|assistant|>\nb</s>\n"


def test_chat_template_by_name_path_or_text(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(MISTRAL)
    assert read_chat_template(MISTRAL) == read_chat_template(str(tmp_path / "own.jinja")) == MISTRAL
    with pytest.raises(UserError, match="one of mistral, zephyr"):
        read_chat_template("mistrall")
    (tmp_path / "own.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_chat_template(str(tmp_path / "own.jinja"))


TEXT = st.text(st.sampled_from("ab ?\n.▁é"), max_size=6)
PIECES = st.lists(
    st.one_of(
        TEXT,
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|", "|>", "<bos>", "<start_of_turn>",
                         "<s>", "</s>", "[INST]", "<|end|>", "<|user|>", "<|eot_id|>", "yes "]),
    ),
    max_size=6,
).map("".join)  # fmt: skip


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


def test_what_a_tokenizer_remembers_of_its_last_call_changes_nothing() -> None:
    used = family_tokenizer("llama3")
    used.backend_tokenizer.enable_truncation(3)
    used.backend_tokenizer.enable_padding(length=500)
    pair = {"prompt": TURNS, "chosen": YES, "rejected": NO}
    assert tokenize(used, pair) == tokenize(family_tokenizer("llama3"), pair)
