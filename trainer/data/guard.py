"""What a chat template left out, or put on the wrong side: each message's text is looked for.

The text of a message is its content, its reasoning, and the names and arguments of its tool calls.
The prompt's must stand where both rendered sides begin alike, an answer's in its own side after
that; blanks may differ. A row that lost its question or its answer, or whose prompt would be
scored, cannot train; one that lost something else is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .formats.messages import REASONING, Messages, RowProblem, content_text, from_json
from .rows import common_prefix

if TYPE_CHECKING:
    from .chat import Rendered
    from .rows import Pair

PROMPT_LOST = "prompt left out by the chat template"
ANSWER_LOST = "answer left out by the chat template"
PROMPT_SCORED = "prompt moved into the answer by the chat template"

_WORDS = re.compile(r"\w+|[^\w\s]")


def check_text(pair: Pair, texts: Rendered, template: str) -> None:
    """Raise ``RowProblem`` for a pair that cannot train; ``pair.lost`` says what else is missing.

    Args:
        pair: the row as it was read.
        texts: the row as it was rendered.
        template: the chat template's source, or "".
    """
    if not pair.conversation:
        return
    prompt, *sides = texts
    shared = prompt[: min(common_prefix(prompt, side) for side in sides)]
    lost = []
    for message in pair.prompt:
        missing = [text for text in texts_of(message) if not occurs(text, shared)]
        moved = [t for t in missing if any(occurs(t, side[len(shared) :]) for side in sides)]
        if moved:
            raise RowProblem(PROMPT_SCORED, _named(message, moved[0]))
        lost += [(message, text) for text in missing]
    asked = pair.prompt[-1]
    if any(message is asked for message, _ in lost) and not _ends_in(asked, shared):
        raise RowProblem(PROMPT_LOST, _named(*lost[-1]))
    start = _last_end(pair.prompt, shared)
    for answer, side in ((pair.chosen, sides[0]), (pair.rejected, sides[1])):
        gone = list(_missing(answer, side[start:]))
        if gone and not any(_ends_in(message, side[start:]) for message in answer):
            raise RowProblem(ANSWER_LOST, _named(*gone[0]))
        lost += gone
    names = [_named(*each) for each in lost]
    names += _unused_arguments(pair.arguments, shared, template)
    more = f", and {len(names) - 1} more" if names[1:] else ""
    pair.lost = f"left out: {names[0]}{more}" if names else ""


def _missing(messages: Messages, rendered: str) -> Iterator[tuple[dict[str, Any], str]]:
    for message in messages:
        for text in texts_of(message):
            if not occurs(text, rendered):
                yield message, text


def _last_end(messages: Messages, shared: str) -> int:
    """Where the last of the prompt's texts ends: what opens an answer may stand in the prompt."""
    texts = [text.strip() for message in messages[-1:] for text in texts_of(message)]
    return max((shared.rfind(text) + len(text) for text in texts if text in shared), default=0)


def texts_of(message: dict[str, Any]) -> Iterator[str]:
    """Every text of a message that a template should write."""
    yield content_text(message)
    yield from (message[name] for name in REASONING if isinstance(message.get(name), str))
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function, dict):
            yield str(function.get("name", ""))
            yield from _leaves(from_json(function.get("arguments")))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield str(name)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)


def occurs(text: str, rendered: str) -> bool:
    """Whether ``text`` stands in ``rendered``: as it is, as JSON writes it, or in other blanks."""
    text = text.strip()
    if text in rendered:
        return True
    if any(json.dumps(text, ensure_ascii=plain)[1:-1] in rendered for plain in (False, True)):
        return True
    end = 0
    for word in _WORDS.findall(text):
        start = rendered.find(word, end)
        if start < 0:
            return False
        end = start + len(word)
    return True


def _ends_in(message: dict[str, Any], rendered: str) -> bool:
    """Whether the last word of one of a message's texts is rendered: templates drop beginnings."""
    words = [_WORDS.findall(text)[-1:] for text in texts_of(message)]
    return any(
        re.search(rf"(?<!\w){re.escape(last)}(?!\w)", rendered) for [last] in filter(None, words)
    )


def _named(message: dict[str, Any], text: str) -> str:
    return f"{text.strip()[:60]!r} of a message with role {message['role']!r}"


def _unused_arguments(arguments: dict[str, Any], shared: str, template: str) -> Iterator[str]:
    for tool in arguments.get("tools") or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in shared:
            yield f"the tool {name!r}"
    for name in arguments.keys() - {"tools"}:
        if template and name not in template:
            yield f"{name!r} of chat_template_kwargs, which the chat template does not read"
