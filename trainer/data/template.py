"""The tokenizer with the chat template of a run: which one it is, and the date it writes."""

from __future__ import annotations

import copy
import datetime
import functools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .formats.messages import ARGUMENTS, Messages, in_forms

if TYPE_CHECKING:
    from ..settings.data import DataSettings

_NOW = re.compile(r"strftime_now\s*\(\s*(['\"])(.*?)\1\s*\)")
_PROBES = ("PROBE", "ANOTHER")
_PRINTED = re.compile(r"['\"]text['\"]")
_ASK: Messages = [{"role": "user", "content": "?"}]


def _call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    call = {"type": "function", "id": "a1b2c3d4e", "function": function, **function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


_TALKS: dict[str, tuple[Messages, Messages]] = {
    "user": ([], []),
    "system": ([], _ASK),
    "developer": ([], _ASK),
    "assistant": (_ASK, []),
    "tool": ([*_ASK, _call({})], []),
}
"""What stands before and after a message of each role."""
_SHIPPED = Path(__file__).parent / "templates"


def own_tokenizer(processing_class: Any) -> Any:
    """The tokenizer in a processor (with the processor's template if it has none), or itself."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is not processing_class and not tokenizer.chat_template:
        tokenizer.chat_template = getattr(processing_class, "chat_template", None)
    if hasattr(processing_class, "image_processor"):
        tokenizer.processor = processing_class
    if type(tokenizer).__name__.startswith("MistralCommon"):
        raise UserError(
            "tokenizer: give one of transformers' own (a folder with tokenizer.json and a chat "
            "template, as tokenizer_name_or_path); mistral-common's has no chat template whose "
            "turns can be told apart"
        )
    return tokenizer


def with_template(tokenizer: Any, settings: DataSettings) -> Any:
    """``tokenizer`` with the template that ``settings`` mean, as it renders conversations.

    The setting ``chat_template`` becomes the tokenizer's own, so that it is saved with the model. A
    template that writes today's date writes ``chat_date`` in the tokenizer returned, a copy.
    """
    tokenizer = own_tokenizer(tokenizer)
    templates = tokenizer.chat_template
    if settings.chat_template is not None:
        named = templates if isinstance(templates, dict) else {}
        template = named.get(settings.chat_template)
        tokenizer.chat_template = template or read_chat_template(settings.chat_template)
    elif isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            "chat_template: set it to one of the tokenizer's templates, none of which is its "
            f"default: {', '.join(sorted(templates))}"
        )
    if not writes_date(tokenizer):
        return tokenizer
    settings.chat_date = settings.chat_date or datetime.date.today().isoformat()
    dated = copy.copy(tokenizer)
    templates = tokenizer.chat_template
    dated.chat_template = (
        {name: _dated(text, settings.chat_date) for name, text in templates.items()}
        if isinstance(templates, dict)
        else _dated(templates, settings.chat_date)
    )
    return dated


def content_forms(tokenizer: Any) -> dict[str, str]:
    """How the template wants each role's content: in "any" form, as "text" alone, or as "parts".

    A template that prints a list of parts as Python does, or writes the first alone, wants text.
    Under `ARGUMENTS`: those of a call in "any" form, as a "mapping", or as the JSON "text" of one.
    """
    forms: dict[str, str] = {}
    for role, (before, after) in _TALKS.items():
        asked = in_forms(before, forms), in_forms(after, forms)
        text, listed = (
            _rendered(tokenizer, [*asked[0], {"role": role, "content": content}, *asked[1]])
            for content in ("".join(_PROBES), [{"type": "text", "text": t} for t in _PROBES])
        )
        takes_parts = all(probe in listed for probe in _PROBES) and not _PRINTED.search(listed)
        takes_text = "".join(_PROBES) in text
        forms[role] = ("any" if takes_text else "parts") if takes_parts else "text"
    return forms | {ARGUMENTS: _argument_form(tokenizer, in_forms(_ASK, forms))}


def _argument_form(tokenizer: Any, ask: Messages) -> str:
    """How the template wants the arguments of a call.

    One that writes them as JSON would write text a second time, in quotes. Another adds them to
    text, or prints a mapping as Python does.
    """
    mapping = dict([_PROBES])
    text = json.dumps(mapping)
    one, other = (_rendered(tokenizer, [*ask, _call(each)]) for each in (mapping, text))
    takes_mapping = all(probe in one for probe in _PROBES) and f"'{_PROBES[0]}'" not in one
    if takes_mapping == (text in other):  # either, or none of them
        return "any"
    return "mapping" if takes_mapping else "text"


def _rendered(tokenizer: Any, messages: Messages) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template can raise anything on what it was not written for
        return ""


def bos_apart(tokenizer: Any) -> bool:
    """Whether the template is one of the shipped, which write a BOS that the published ones do not.

    The published trainers tokenized texts without it, and put it in front. Some tokenizers write
    the first word with another token where BOS stands before it in the text.
    """
    template = tokenizer.chat_template  # a dictionary where it has several
    return tokenizer.bos_token is not None and isinstance(template, str) and template in _shipped()


@functools.cache
def _shipped() -> frozenset[str]:
    return frozenset(path.read_text(encoding="utf-8") for path in _SHIPPED.glob("*.jinja"))


def writes_date(tokenizer: Any) -> bool:
    """Whether a template of the tokenizer asks for today's date."""
    templates = own_tokenizer(tokenizer).chat_template or ""
    texts = templates.values() if isinstance(templates, dict) else [templates]
    return any(_NOW.search(text) for text in texts)


def _dated(template: str, date: str) -> str:
    day = datetime.datetime.fromisoformat(date)
    written = _NOW.sub(lambda call: repr(day.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", written):
        raise UserError(
            "chat_template: give one that asks for the date as strftime_now('%d %b %Y'), with its "
            "format in quotes; this one's date cannot be kept when the run is resumed"
        )
    return written


def generation_stops(tokenizer: Any, settings: Any) -> frozenset[int]:
    """The tokens that end generation, by the generation config beside the model or tokenizer."""
    from transformers import GenerationConfig

    name = getattr(settings, "model_name_or_path", None) or tokenizer.name_or_path
    try:
        eos: Any = GenerationConfig.from_pretrained(name).eos_token_id if name else None
    except (OSError, ValueError):  # it has none
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


def read_chat_template(value: str) -> str:
    """The template that the setting ``chat_template`` means: itself, a shipped one, or a file."""
    if "{{" in value or "{%" in value:
        return value
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.jinja"))}
    path = shipped.get(value, Path(os.path.expanduser(value)))
    if not path.is_file():
        raise UserError(
            f"chat_template: {value!r} is neither a Jinja template (no {{{{ or {{% in it) nor an "
            f"existing file nor a shipped template; give the template itself, its path, or one of "
            f"{', '.join(shipped)}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template: {value}: cannot be read as UTF-8 text ({error}); name another file"
        ) from error
