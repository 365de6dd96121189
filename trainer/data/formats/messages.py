"""Messages as others write them -> messages as chat templates read them.

JSON text is parsed, ShareGPT's ``from`` and ``value`` are renamed, and the nulls go that Arrow puts
where a struct of another row has a field. Content in parts stays in parts: of text, and places of
images.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from ...files import parse_json

Messages = list[dict[str, Any]]

MISSING = "missing value"
WRONG_TYPE = "wrong type"
NOT_TEXT = "content that is not text"

REASONING = ("reasoning_content", "reasoning", "thinking")
ARGUMENTS = "arguments of a call"
"""What has a form beside the content of each role: see `in_forms`."""
MESSAGE_FIELDS = {"role", "content", "tool_calls", "tool_call_id", *REASONING}
"""What is read of a message, or missed where the template leaves it out."""
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}


_PRINTED = re.compile(r"\s*\[?\s*\{\s*'\w+'\s*:")
_MEANT = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")
"""How a text begins that somebody made of messages."""


class RowProblem(Exception):
    """A row that cannot train: why, in the words of the report, and what was seen."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def from_json(value: Any) -> Any:
    """What a text of JSON, or of a list as Python prints it, holds; another value as it is.

    pandas' to_csv prints lists so.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return parse_json(value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value.strip()) if _PRINTED.match(value) else value
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def without_nulls(value: Any) -> Any:
    """``value`` without the null fields of its structs, at every depth."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def as_messages(value: Any) -> Any:
    """``value`` as a list of messages where it holds some in any form, else as it is.

    Raises:
        RowProblem: it is text that looks like messages, and cannot be read.
    """
    parsed = from_json(value)
    if isinstance(parsed, str) and _MEANT.match(parsed):
        raise RowProblem(
            WRONG_TYPE, f"messages as text that is neither JSON nor a Python list: {parsed[:40]!r}"
        )
    single = _is_message(parsed)
    if isinstance(value, str) and isinstance(parsed, dict) and "role" in parsed:
        single = bool({"content", "tool_calls"} & parsed.keys())  # else an answer in JSON
    parsed = [parsed] if single else parsed
    if isinstance(value, str) and not _are_messages(parsed):
        return value
    if not isinstance(parsed, list):
        return parsed
    return [_renamed(without_nulls(message)) for message in parsed]


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or {"from", "value"} <= value.keys())


def _renamed(message: Any) -> Any:
    """A message of ShareGPT's with the usual names."""
    if not isinstance(message, dict) or "from" not in message or "role" in message:
        return message
    others = {k: v for k, v in message.items() if k not in ("from", "value")}
    said, content = message["from"], message.get("value")
    role = SHAREGPT_ROLES.get(said, said) if isinstance(said, str) else said
    call = from_json(content) if said == "function_call" else None
    if call:
        calls = call if isinstance(call, list) else [call]
        if all(isinstance(each, dict) and "name" in each for each in calls):
            wrapped = [{"type": "function", "function": each} for each in calls]
            return {"role": role, "content": "", "tool_calls": wrapped, **others}
    return {"role": role, **({} if content is None else {"content": content}), **others}


def read_messages(name: str, value: Any) -> Messages:
    """The messages of a column; a text is one assistant message.

    Raises:
        RowProblem: what is there is no list of messages of text.
    """
    value = as_messages(value)
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list):
        raise RowProblem(WRONG_TYPE, f"{name} is {kind(value)}")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowProblem(WRONG_TYPE, f"{name} is {kind(message)}, not a message")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RowProblem(WRONG_TYPE, f"{name} has role {kind(role)}")
    if content is None and not message.get("tool_calls"):
        raise RowProblem(MISSING, f"{name} has no content")
    if isinstance(content, list):
        return {**message, "content": [_part(name, part) for part in content]}
    if content is not None and not isinstance(content, str):
        raise RowProblem(WRONG_TYPE, f"{name} has content {kind(content)}")
    return message


def _part(name: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise RowProblem(WRONG_TYPE, f"{name} has a part {kind(part)}")
    if part == IMAGE_PART:
        return part
    if not isinstance(part.get("text"), str) or part.get("type", "text") not in TEXT_PARTS:
        raise RowProblem(NOT_TEXT, f"{name} has a part of type {part.get('type')!r}")
    return {**part, "type": "text"}


TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PART = {"type": "image"}
"""The place of an image, which a column of its row holds."""


def content_text(message: dict[str, Any]) -> str:
    """A message's content as one text, its parts joined."""
    content = message.get("content") or ""
    return (
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    )


def in_forms(messages: Messages, forms: Mapping[str, str]) -> Messages:
    """``messages`` with content and calls as ``forms`` has them: `template.content_forms`."""
    usual, arguments = forms.get("user", "any"), forms.get(ARGUMENTS, "any")
    return [
        _calls_in_form(_in_form(message, forms.get(message["role"], usual)), arguments)
        for message in messages
    ]


def _in_form(message: dict[str, Any], form: str) -> dict[str, Any]:
    content = message.get("content")
    if form == "parts" and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if form == "text" and isinstance(content, list):
        return {**message, "content": content_text(message)}
    return message


def _calls_in_form(message: dict[str, Any], form: str) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if form == "any" or not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_in_form(call, form) for call in calls]}


def _call_in_form(call: Any, form: str) -> Any:
    """A call with its arguments as a mapping or as the JSON text of one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call_in_form(call["function"], form)}
    given = call.get("arguments")
    if form == "mapping" and isinstance(given, str):
        mapping = from_json(given) if given.strip() else {}
        return {**call, "arguments": mapping} if isinstance(mapping, dict) else call
    if form == "text" and isinstance(given, dict):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    return call
