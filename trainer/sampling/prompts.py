"""A data set -> the prompts that a model answers, each once, as text and as token ids.

A row's prompt is what training would read in it, with its system text, its earlier turns and its
tools; the answers that a row may have count for nothing. A text alone is a user's message.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..data.chat import plain_text_prefix, render
from ..data.encoder import encode, single_bos
from ..data.formats.answers import Edges
from ..data.formats.converters import transcript
from ..data.formats.files import ONE_TABLE, open_source
from ..data.formats.messages import MISSING, as_messages, content_text
from ..data.formats.shapes import shape_of, standard_rows
from ..data.guard import PROMPT_LOST, occurs
from ..data.images.columns import checked_media, show_images
from ..data.rows import DESIRABLE, Pair, RowProblem, attempt, dressed, read_row
from ..data.template import content_forms
from ..errors import UserError
from ..files import digest
from ..text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGUN = "prompt that begins an answer"
_SIDES = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
_ASKED = ("query", "context", "history", "conversation_a")
"""Columns with the prompt in data sets of several answers, where none of a pair's has it."""


@dataclass
class Prompt:
    """A prompt: messages, or plain text that is continued without a chat template."""

    content: Any
    row: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    #: Of the tokenizer; None for a server.
    token_ids: list[int] | None = None

    @property
    def id(self) -> str:
        facts = [self.content, self.arguments] if self.arguments else [self.content]
        return digest([json.dumps(facts, sort_keys=True, default=str)], 8)


def open_prompts(source: str, split: str | None) -> Any:
    """The rows of a file, a folder or a hub name; of ``split``, or of its training split."""
    tables = open_source(source, [split or "train"], [])
    if ONE_TABLE in tables:
        return checked_media(source, tables[ONE_TABLE], readable=False)[0]
    names = [name for name in tables if (name == split if split else "train" in name)]
    if len(names) != 1:
        raise UserError(f"--split: name one of {', '.join(tables)}, the splits of {source}")
    return checked_media(source, tables[names[0]], readable=False)[0]


def read_prompts(
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    opening: list[dict[str, str]],
    limit: int | None,
) -> tuple[list[Prompt], list[str]]:
    """The first ``limit`` distinct prompts of ``rows``, and what to say of rows without one.

    ``opening`` goes before prompts without a system message. ``tokenizer`` is None for a server.
    """
    templated = tokenizer is not None and tokenizer.chat_template
    forms = content_forms(tokenizer) if templated else {"user": "text"}
    prompts: dict[str, Prompt] = {}
    problems: Counter[str] = Counter()
    examples: dict[str, str] = {}
    repeated = 0
    for number, row in enumerate(rows):
        if len(prompts) == limit:
            break
        prompt = attempt(_prompt, row, forms, tokenizer, opening)
        if isinstance(prompt, RowProblem):
            problems[prompt.reason] += 1
            examples.setdefault(prompt.reason, f"row {number}: {prompt.detail}")
            continue
        repeated += prompt.id in prompts
        prompts.setdefault(prompt.id, prompt)
    lines = [
        f"left out: {count:,} rows, {reason} ({printable(examples[reason], 200)})"
        for reason, count in problems.items()
    ]
    if not prompts:
        raise UserError(f"no row has a prompt; {'; '.join(lines) or 'there are no rows'}")
    if repeated:
        lines.append(f"{repeated:,} rows repeat a prompt, which is answered once")
    return list(prompts.values()), lines


def _prompt(
    row: dict[str, Any],
    forms: dict[str, str],
    tokenizer: PreTrainedTokenizerBase | None,
    opening: list[dict[str, str]],
) -> Prompt:
    pair = _read(row)
    if pair.begun:
        raise RowProblem(BEGUN, "end the prompt before it")
    prompt = Prompt(pair.prompt, json.loads(json.dumps(row, default=str)))
    if pair.conversation:
        if pair.prompt[0]["role"] != "system":
            pair.prompt = [*opening, *pair.prompt]
        pair = dressed(pair, row, {}, forms)
        prompt.content, prompt.arguments = pair.prompt, pair.arguments
    if tokenizer is not None:
        prompt.token_ids = _tokens(prompt, pair.conversation, tokenizer)
    elif not pair.conversation:
        raise RowProblem("plain text", "a server takes messages; give the prompt as messages")
    elif prompt.arguments:
        raise RowProblem("arguments of a template", "a server cannot be told tools or others")
    return prompt


def _read(row: dict[str, Any]) -> Pair:
    """The row as a pair, whose answers mean nothing: beside a prompt any may be missing."""
    answers = [row[side] for side in _SIDES if row.get(side)]
    paired = bool(answers) and _SIDES.keys() <= row.keys()
    one = paired and row.get("prompt") is not None and answers[1:] in ([], answers[:1])
    if one:
        row = row | dict.fromkeys(_SIDES, answers[0])
    elif not paired:
        row = _unanswered(row)
    read = standard_rows(row, Edges())[0]
    pair = read_row(read | {DESIRABLE: True} if one else read)
    show_images(pair, row)  # none, so no message may have a place for one
    return pair


def _unanswered(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `_SIDES` for its answers; a talk ends before the answer that it ends with."""
    shape = shape_of((*row, *_SIDES))
    column, to = next((name for name in _ASKED if name in row), None), "prompt"
    if shape is not None and _SIDES.keys() < {*shape.needs}:
        column = to = shape.needs[0]
    if column is None:
        raise RowProblem(MISSING, f"rename the prompt's column to prompt; found {', '.join(row)}")
    rest = {name: value for name, value in row.items() if name != column} | _SIDES
    if column == "prompt":
        return rest | {"prompt": transcript(row["prompt"])}
    talk = as_messages(row[column])
    while isinstance(talk, list) and talk and _answers(talk[-1]):
        talk = talk[:-1]
    return rest | {to: talk}


def _answers(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _tokens(prompt: Prompt, talk: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt up to where the answer begins, as tokens; nothing of it may be lost."""
    if not talk:
        return plain_text_prefix(tokenizer) + encode(tokenizer, [prompt.content])[0]
    text = render(tokenizer, [prompt.content], True, prompt.arguments)[0]
    if isinstance(text, RowProblem):
        raise text
    lost = [said for said in map(content_text, prompt.content) if not occurs(said, text)]
    if lost:
        raise RowProblem(PROMPT_LOST, lost[0])
    bos = tokenizer.bos_token_id
    return single_bos(encode(tokenizer, [text])[0], bos if isinstance(bos, int) else None)
