"""Conversations render to the ids of the tokenizer's own `apply_chat_template`, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from widemargin.trainer.data import DataSettings, load_pairs, tokenize_pairs
from widemargin.trainer.data.chat import Rendering
from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.limits import FLAGS, MISMATCH, OK, Limits
from widemargin.trainer.data.template import read_chat_template
from widemargin.trainer.errors import UserError

from tests.support import tokenized_rows
from tests.support.chat_tokenizers import FAMILIES, MISTRAL, family_tokenizer
from tests.support.pair_rows import Row, bot, make_rows, user, write
from tests.support.tiny_tokenizers import (
    MERGING,
    NO_SYSTEM,
    TEMPLATES,
    WITH_BOS,
    WITHOUT_BOS,
    WITHOUT_END,
    tiny_tokenizer,
)
from tests.support.tokenized_rows import SAME_PAIR

pytestmark = pytest.mark.usefixtures("own_cache")


LOOSE = Limits(None, None, None, "keep_end")


ASK = [user("Is water wet?")]


TURNS = [user("What is the capital of France?"), bot("Paris."), *ASK]


YES, NO = [bot("Yes, it is.")], [bot("No\n\nmaybe")]


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def tokenize(tokenizer: Any, row: Row, **rendering: bool) -> Row:
    columns = PairTokenizer(tokenizer, LOOSE, Rendering(**rendering))({k: [row[k]] for k in row})
    done = {name: values[0] for name, values in columns.items()}
    return done | {"flags": {flag for i, flag in enumerate(FLAGS) if done["flags"] >> i & 1}}


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


def test_what_a_tokenizer_remembers_of_its_last_call_changes_nothing() -> None:
    used = family_tokenizer("llama3")
    used.backend_tokenizer.enable_truncation(3)
    used.backend_tokenizer.enable_padding(length=500)
    pair = {"prompt": TURNS, "chosen": YES, "rejected": NO}
    assert tokenize(used, pair) == tokenize(family_tokenizer("llama3"), pair)


def test_a_row_the_template_refuses_leaves_the_others() -> None:
    refused = SAME_PAIR["messages"] | {"prompt": [system("Be brief."), *ASK]}
    good, bad = tokenized_rows.tokenize(
        SAME_PAIR["messages"], refused, template=TEMPLATES["no_system"]
    )
    assert good["status"] == OK
    assert bad["status"] == "refused by the chat template"
    assert "System role not supported" in bad["detail"]


def test_messages_without_a_template_are_an_error_with_advice() -> None:
    with pytest.raises(UserError, match="set chat_template:"):
        tokenized_rows.tokenize(SAME_PAIR["messages"], template=None)


def test_chat_template_setting(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "?"}]
    row = {"prompt": ask, "chosen": "yes", "rejected": "no"}
    raw = Dataset.from_list([row])
    (tmp_path / "chat.jinja").write_text(MERGING)
    for value in (MERGING, str(tmp_path / "chat.jinja")):
        tokenizer = tiny_tokenizer(None)
        _, report = tokenize_pairs(raw, tokenizer, DataSettings(chat_template=value))
        assert tokenizer.chat_template == MERGING
        assert report.flags == {MISMATCH: 1}
        assert report.mismatches[0].startswith("row 0 of train_dataset: the last 1 of")
    with pytest.raises(UserError, match="neither a Jinja template"):
        tokenize_pairs(raw, tiny_tokenizer(), DataSettings(chat_template="chatml"))
    with pytest.raises(UserError, match="has no chat template; set chat_template:"):
        tokenize_pairs(raw, tiny_tokenizer(None))


def test_notes_tell_what_is_unusual_about_a_template(tmp_path: Path) -> None:
    setting = DataSettings(write(tmp_path / "a.jsonl", make_rows(2)), dataset_splits=["train"])

    def notes(template: str, adds_bos: bool = True) -> str:
        return " ".join(load_pairs(setting, tiny_tokenizer(template, adds_bos)).report.notes)

    assert notes(WITH_BOS) == notes(NO_SYSTEM) == notes(WITHOUT_BOS, adds_bos=False) == ""
    assert "the chat template writes none" in notes(WITHOUT_BOS)
    assert "learnt without an end" in notes(WITHOUT_END)
