"""In every family's style of template: nothing is lost unsaid, and the answer alone is scored."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.data import DataSettings
from widemargin.trainer.data.chat import Rendering
from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.limits import (
    AFTER_END,
    CHOSEN_NO_END,
    FLAGS,
    MISMATCH,
    OK,
    TEXT_LOST,
    Limits,
)
from widemargin.trainer.data.template import with_template

from tests.support.chat_styles import STYLES, styled_tokenizer
from tests.support.pair_rows import Row, bot, user

LOOSE = Limits(None, None, None, "keep_end")
DAY = DataSettings(chat_date="2026-01-31")
PLACE = {"type": "object", "properties": {"place9": {"type": "string"}}}
LOOK = {"name": "look9", "description": "looks it up", "parameters": PLACE}
TOOLS = [{"type": "function", "function": LOOK}]


@cache
def dated(name: str) -> Any:
    """The tokenizer of a style as a run has it, with its date."""
    return with_template(styled_tokenizer(name), DAY)


@cache
def reader(name: str, score: str = "completion") -> PairTokenizer:
    arguments = dict(STYLES[name].given)
    return PairTokenizer(dated(name), LOOSE, Rendering(score=score, arguments=arguments))


def read(name: str, row: Row, score: str = "completion") -> Row:
    columns = reader(name, score)({column: [value] for column, value in row.items()})
    done = {column: values[0] for column, values in columns.items()}
    return done | {"flags": {flag for i, flag in enumerate(FLAGS) if done["flags"] >> i & 1}}


def scored(name: str, done: Row, side: str = "chosen") -> str:
    left = set(done[f"{side}_unscored"])
    kept = [token for i, token in enumerate(done[f"{side}_ids"]) if i not in left]
    return str(dated(name).decode(kept))


def without_blanks(text: str) -> str:
    return re.sub(r"[\s▁]+", "", text)


def own_ids(name: str, messages: list[Row], row: Row, generation: bool) -> list[int]:
    """What the tokenizer makes of the messages itself."""
    given = dict(STYLES[name].given) | row.get("chat_template_kwargs", {})
    return dated(name).apply_chat_template(
        messages,
        tools=row.get("tools"),
        add_generation_prompt=generation,
        return_dict=False,
        **given,
    )


def called(number: int) -> Row:
    function = {"name": "look9", "arguments": {"place9": f"Ghent{number}"}}
    call = {"type": "function", "id": f"call{number:05}", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def told(number: int) -> Row:
    return {"role": "tool", "content": f"cold{number}", "tool_call_id": f"call{number:05}"}


PAIR = {"chosen": [bot("yes, it is")], "rejected": [bot("no\n\nmaybe")]}
SYSTEM = {"role": "system", "content": "Be brief."}
TALKS: dict[str, list[Row]] = {
    "a question": [user("Is water wet?")],
    "several turns": [user("wet?"), bot("Yes."), user("Why?")],
    "system": [SYSTEM, user("Is water wet?")],
    "system, several turns": [SYSTEM, user("wet?"), bot("Yes."), user("Why?")],
    "a call": [user("Is it cold?"), called(1), told(1)],
}
CANNOT = {
    "system": {"gemma2", "mistral_v1"},
    "system, several turns": {"gemma2", "mistral_v1"},
    "a call": {"gemma2", "gemma3", "mistral_v1", "phi3", "phi4", "phi4_mini", "command_r", "zephyr",
               "chatml", "vicuna", "llama2", "falcon", "falcon3", "nemotron", "smollm2", "smollm3",
               "olmo2"},
}  # fmt: skip
"""The styles whose template refuses such a prompt, or leaves some of it out."""


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", STYLES)
def test_ids_are_the_tokenizers_own(name: str, talk: str) -> None:
    style, tokenizer = STYLES[name], dated(name)
    row: Row = PAIR | {"prompt": TALKS[talk]} | ({"tools": TOOLS} if talk == "a call" else {})
    done = read(name, row)
    if name in CANNOT.get(talk, ()):
        assert done["status"] != OK or TEXT_LOST in done["flags"]
        return
    assert done["status"] == OK, done["detail"]
    assert done["prompt_ids"] == own_ids(name, row["prompt"], row, True)
    assert done["flags"] == (
        set() if style.end else {CHOSEN_NO_END, "rejected without end-of-turn token"}
    )
    for side in ("chosen", "rejected"):
        whole = own_ids(name, row["prompt"] + row[side], row, False)
        ours = done["prompt_ids"] + done[f"{side}_ids"]
        if name != "mistral_v3" or "system" not in talk:  # which writes it for a last user alone
            assert ours == whole[: len(ours)]
        expected = style.opens + row[side][0]["content"] + style.end
        assert without_blanks(scored(name, done, side)) == without_blanks(expected)
        assert tokenizer.decode(whole[len(ours) :]).strip() in ("", "<|endoftext|>")


def leaves(message: Row) -> Iterator[str]:
    """Every text that somebody wrote in a message."""
    content = message.get("content") or ""
    yield content if isinstance(content, str) else "".join(part["text"] for part in content)
    yield message.get("reasoning_content", "")
    for call in message.get("tool_calls", ()):
        yield from ("look9", *call["function"]["arguments"].values())


def says(rendered: str, text: str) -> bool:
    written = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return any(without_blanks(each) in without_blanks(rendered) for each in written)


WORD = re.compile(r"(?:word|end|more|muse|cold|Ghent)[0-9]+x?")
BLANKS = ["", " ", "\n"]
BETWEEN = [
    "",
    "\n\n",
    " #1. ",
    '{"a": 1}',
    "<b>",
    "'\"",
    "\\",
    "</think>",
    "<think>x</think>",
    "{{ y }}",
]


UNSAID = {TEXT_LOST, AFTER_END, MISMATCH}
ANALYSIS = "analysisassistant"


@cache
def special(name: str) -> list[str]:
    added = dated(name).added_tokens_decoder.values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def rest_of(name: str, counted: str, texts: list[str]) -> str:
    """What is scored beside the answer's own texts and the template's special tokens."""
    rest = without_blanks(counted)
    for text in [*map(without_blanks, texts), *map(without_blanks, special(name))]:
        rest = rest.replace(text, "") if text else rest
    return re.sub("final|</?think>", "", rest)


def rarely(draw: Any) -> bool:
    return draw(st.integers(0, 9)) == 7


@st.composite
def messages(draw: Any, roles: str, begins: int) -> list[Row]:
    """A message for each letter of ``roles``, each with words that no other has."""
    made: list[Row] = []
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "h": "human"}
    for number, role in enumerate(roles, begins):
        if role in "ct":
            made.append(called(number) if role == "c" else told(number - 1))
            continue
        between = draw(st.sampled_from(BETWEEN))
        text = f"{draw(st.sampled_from(BLANKS))}word{number}x {between} end{number}x"
        content: Any = text + draw(st.sampled_from(BLANKS))
        if rarely(draw):
            content = [{"type": "text", "text": text}, {"type": "text", "text": f" more{number}x"}]
        made.append({"role": names[role], "content": content})
        if role == "a" and rarely(draw):
            made[-1]["reasoning_content"] = f"muse{number}x"
    return made


@st.composite
def rows(draw: Any) -> Row:
    """A pair of any mixture of roles, parts, tools, calls and reasoning."""
    starts, turns, answers = (
        ["", "", "", "s", "d"],
        ["", "ua", "uaua", "ucta", "a", "h"],
        ["cta", "c"],
    )
    prompt = draw(st.sampled_from(starts)) + draw(st.sampled_from(turns)) + "u"
    answer = draw(st.sampled_from(["a", "a", "aua", "auaua", *answers]))
    row = {"prompt": draw(messages(prompt, 10)), "chosen": draw(messages(answer, 30))}
    row["rejected"] = draw(messages("a", 50))
    if "c" in prompt + answer or rarely(draw):
        row["tools"] = TOOLS
    if rarely(draw):
        row["chat_template_kwargs"] = {"enable_thinking": False}
    return row


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    row=rows(), score=st.sampled_from(["completion", "completion", "last_turn", "all_assistant"])
)
def test_text_is_rendered_flagged_or_refused_and_the_answer_alone_is_scored(
    name: str, row: Row, score: str
) -> None:
    done = read(name, row, score)
    if done["status"] != OK:
        assert done["detail"]
        return
    asked = [text for message in row["prompt"] for text in leaves(message)]
    for side in ("chosen", "rejected"):
        answers = [message for message in row[side] if message["role"] == "assistant"]
        if score == "last_turn":
            answers = answers[-1:]
        if score == "all_assistant":
            asked_first = [m["role"] for m in row["prompt"]].index("user")
            answers = [m for m in row["prompt"][asked_first:] if m["role"] == "assistant"] + answers
        shown = dated(name).decode(done["prompt_ids"] + done[f"{side}_ids"])
        said = [text for message in row[side] for text in leaves(message)]
        unsaid = done["flags"] & UNSAID
        assert unsaid or all(says(shown, text) for text in asked + said)
        counted = scored(name, done, side)
        texts = [text for message in answers for text in leaves(message)]
        mine = set(WORD.findall(" ".join(texts)))
        assert set(WORD.findall(counted)) <= mine
        assert unsaid or set(WORD.findall(counted)) == mine
        simple = not any("tool_calls" in m for m in answers) and "think" not in " ".join(texts)
        assert unsaid or not simple or rest_of(name, counted, texts) in ("", ANALYSIS)
