"""One raw row -> a pair to tokenize, whatever format it came in.

Each row shows its format, so a data set may mix them:

==================  =======================================  ====================================
``prompt``          ``chosen``, ``rejected``                 becomes
==================  =======================================  ====================================
text                text                                     plain text, no chat template
messages            messages of the answer                   conversation
messages            whole conversations, prompt included     conversation
messages            text                                     conversation
text                whole conversations                      conversation; the prompt text is
                                                             theirs already and is ignored
text                messages of the answer                   conversation of one user message
absent              conversations sharing their beginning    conversation
absent              texts sharing their beginning            plain text
==================  =======================================  ====================================
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .formats.answers import DESIRABLE, NUMBER_COLUMNS, SCORES
from .formats.converters import label_of
from .formats.messages import (
    MISSING,
    REASONING,
    as_messages,
    content_text,
    in_forms,
    kind,
    read_messages,
)
from .formats.messages import WRONG_TYPE as WRONG_TYPE
from .formats.messages import Messages as Messages
from .formats.messages import RowProblem as RowProblem
from .formats.shapes import SINGLE, arguments_of

EMPTY_COMPLETION = "empty completion"
IDENTICAL = "identical sides"
NO_SHARED_PROMPT = "no shared prompt"

# Text transcripts in the Anthropic style start the answer after this mark.
ANSWER_MARK = "\n\nAssistant:"


BAD_NUMBER = "a number that cannot be used"


@dataclass
class Pair:
    """A row ready to tokenize: three texts, or (``conversation``) three lists of messages."""

    prompt: Any
    chosen: Any
    rejected: Any
    conversation: bool
    #: The prompt's last message, where it begins the answers: they hold its text too.
    begun: dict[str, Any] | None = None
    #: What the chat template is given beside the messages: ``tools``, and what it calls its own.
    arguments: dict[str, Any] = field(default_factory=dict)
    #: The images that its prompt shows, encoded.
    images: list[bytes] = field(default_factory=list)
    #: What of its text the chat template left out.
    lost: str = ""
    #: Of `NUMBER_COLUMNS` those that the row has.
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def several_turns(self) -> bool:
        """Whether a completion goes on past the first user turn, which it then also learns."""
        sides = (self.chosen, self.rejected) if self.conversation else ()
        return any(message["role"] == "user" for side in sides for message in side)


def attempt(function: Any, *args: Any) -> Any:
    """What ``function`` returns, or the ``RowProblem`` it raises."""
    try:
        return function(*args)
    except RowProblem as problem:
        return problem


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """The row's `NUMBER_COLUMNS`; ``RowProblem`` for one not finite, or a weight below 0.

    A score may be missing: what uses scores asks for each.
    """
    numbers = {}
    if SINGLE[1] in row and SINGLE[2] in row:
        numbers[DESIRABLE] = label_of(row[SINGLE[2]])
    for name in NUMBER_COLUMNS:
        if name not in row or (name in SCORES and row[name] in (None, "")):
            continue
        value = row[name]
        try:  # text too, as tables of text have it
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or (name == "weight" and number < 0):
            wanted = "a finite number of 0 or more" if name == "weight" else "a finite number"
            raise RowProblem(BAD_NUMBER, f"{name} is {value!r}, not {wanted}")
        numbers[name] = number
    return numbers


def read_row(row: dict[str, Any]) -> Pair:
    """The pair in ``row``, or ``RowProblem``. An absent ``prompt`` is what the sides share.

    The sides of a row with `DESIRABLE` are one answer.
    """
    alike = DESIRABLE in row
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowProblem(MISSING, f"{name} is missing")
    if "prompt" in row and row["prompt"] is None:
        raise RowProblem(MISSING, "prompt is missing")
    chosen, rejected, prompt = (
        as_messages(row.get(name)) for name in ("chosen", "rejected", "prompt")
    )
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return _text_pair(prompt, chosen, rejected, alike)
    return _conversation_pair(prompt, chosen, rejected, alike)


def dressed(
    pair: Pair, row: dict[str, Any], arguments: dict[str, Any], forms: Mapping[str, str]
) -> Pair:
    """A conversation with what its template is given, and content as the template wants it.

    Args:
        pair: of ``row``.
        row: its columns.
        arguments: of the run; the row's go before them.
        forms: how content is written: see `template.content_forms`.
    """
    if pair.conversation:
        pair.arguments = arguments | arguments_of(row)
        pair.prompt, pair.chosen, pair.rejected = (
            in_forms(messages, forms) for messages in (pair.prompt, pair.chosen, pair.rejected)
        )
        pair.begun = in_forms([pair.begun], forms)[0] if pair.begun else None
    return pair


def alike_in_arguments(pairs: Iterable[Pair | RowProblem]) -> Iterable[list[Pair]]:
    """The conversations in ``pairs`` by what their template is given beside them."""
    alike: dict[str, list[Pair]] = {}
    for pair in pairs:
        if isinstance(pair, Pair) and pair.conversation:
            alike.setdefault(json.dumps(pair.arguments, default=str), []).append(pair)
    return alike.values()


def _text_pair(prompt: Any, chosen: str, rejected: str, alike: bool) -> Pair:
    _check_sides(chosen.strip(), rejected.strip(), chosen == rejected and not alike)
    if prompt is None:
        start = _shared_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
        if not prompt:
            raise RowProblem(NO_SHARED_PROMPT, f"chosen starts {chosen[:40]!r}")
        _check_sides(chosen.strip(), rejected.strip(), False)
    elif not isinstance(prompt, str):
        raise RowProblem(WRONG_TYPE, f"prompt is {kind(prompt)}")
    return Pair(prompt, chosen, rejected, conversation=False)


def _shared_text(chosen: str, rejected: str) -> int:
    """Length of the shared beginning, back to a word boundary, or to the last answer mark in it."""
    shared = chosen[: common_prefix(chosen, rejected)]
    mark = shared.rfind(ANSWER_MARK)
    if mark >= 0:
        return mark + len(ANSWER_MARK)
    inside_word = any(
        len(side) > len(shared) and not side[len(shared)].isspace() for side in (chosen, rejected)
    )
    while inside_word and shared and not shared[-1].isspace():
        shared = shared[:-1]
    # A space belongs to the word after it, as tokenizers have it.
    return len(shared.removesuffix(" "))


def _conversation_pair(prompt: Any, chosen: Any, rejected: Any, alike: bool) -> Pair:
    chosen = read_messages("chosen", chosen)
    rejected = read_messages("rejected", rejected)
    begins = False
    if isinstance(prompt, str):
        answers_only = all(side and side[0]["role"] == "assistant" for side in (chosen, rejected))
        prompt = [{"role": "user", "content": prompt}] if answers_only else None
    if prompt is None or prompt == []:
        _check_sides(chosen, rejected, chosen == rejected and not alike)
        shared = _shared_messages(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        prompt = read_messages("prompt", prompt)
        if prompt and all(side[: len(prompt)] == prompt for side in (chosen, rejected)):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        else:  # in whole conversations two answers in a row are two messages
            prompt = prompt[:-1] if _is_blank_answer(prompt[-1:]) else prompt
            begins = bool(prompt) and prompt[-1]["role"] == "assistant"
    told = _told_to_both(chosen, rejected)
    prompt, chosen, rejected = prompt + chosen[:told], chosen[told:], rejected[told:]
    begins = begins and not told
    identical = chosen == rejected and not alike
    _check_sides(_says_something(chosen), _says_something(rejected), identical)
    if not prompt or any(side[0]["role"] in ("user", "system") for side in (chosen, rejected)):
        raise RowProblem(
            NO_SHARED_PROMPT,
            f"after {len(prompt)} shared messages, chosen goes on with a {chosen[0]['role']!r} "
            f"message and rejected with a {rejected[0]['role']!r} one",
        )
    if begins and not prompt[-1].get("tool_calls"):
        return _continued(prompt, chosen, rejected)
    return Pair(prompt, chosen, rejected, conversation=True)


def _continued(prompt: Messages, chosen: Messages, rejected: Messages) -> Pair:
    """The pair whose prompt ends in an answer that both sides go on with."""
    begun = prompt[-1]
    if len(prompt) == 1:
        raise RowProblem(NO_SHARED_PROMPT, "the prompt is the beginning of an answer, and no more")
    firsts = [side[0] for side in (chosen, rejected)]
    if not all(isinstance(m.get("content"), str) for m in (begun, *firsts)):
        raise RowProblem(WRONG_TYPE, "the prompt ends in an answer, to go on with text alone")
    if any(first["role"] != "assistant" for first in firsts):
        return Pair(prompt, chosen, rejected, conversation=True)
    sides = [
        [{**begun, **side[0], "content": begun["content"] + side[0]["content"]}, *side[1:]]
        for side in (chosen, rejected)
    ]
    return Pair(prompt[:-1], sides[0], sides[1], conversation=True, begun=begun)


def _shared_messages(chosen: Messages, rejected: Messages) -> int:
    """Messages both sides begin with, leaving each side one."""
    return min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)


def _told_to_both(chosen: Messages, rejected: Messages) -> int:
    """Messages that both sides begin with before any answer, such as what a tool said."""
    shared = _shared_messages(chosen, rejected) if chosen and rejected else 0
    roles = [message["role"] for message in chosen[:shared]]
    return next((i for i, role in enumerate(roles) if role != "tool"), shared)


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items ``a`` and ``b`` share at their beginning."""
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


def _says_something(messages: Messages) -> bool:
    return any(content_text(message).strip() or message.get("tool_calls") for message in messages)


def _is_blank_answer(messages: Messages) -> bool:
    """Whether they end in an answer that is yet to be written, which only holds its place."""
    return (
        not _says_something(messages)
        and bool(messages)
        and messages[-1]["role"] == "assistant"
        and not any(messages[-1].get(name) for name in REASONING)
    )


def _check_sides(chosen: Any, rejected: Any, identical: bool) -> None:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not side:
            raise RowProblem(EMPTY_COMPLETION, f"{name} is empty")
    if identical:
        raise RowProblem(IDENTICAL, "chosen and rejected are the same")
