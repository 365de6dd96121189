"""Values as YAML and command lines have them, turned into what a setting's type says."""

from __future__ import annotations

import datetime
import math
import re
import reprlib
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from typing import Any

from ..errors import UserError

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

LISTED = re.compile(r"[\w./-]+(\s*,\s*[\w./-]+)+")
"""Names with commas between them, a list as the alignment handbook's command line has it."""

LONGEST_NUMBER = 40
"""Characters of a number in a settings file; those of `fp64` have 25 at most."""

AS_WRITTEN = ("columns", "chat_template_kwargs")
"""Mappings whose text stays text; in others, such as ``lr_scheduler_kwargs``, 1e-7 is a number."""

OR_BOOL = ("resume_from_checkpoint", "fsdp")
"""Texts that may be true or false, which transformers' types do not say."""

TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
"""Types that are checked, in a user's words."""


@cache
def hints_of(kind: type[Any]) -> dict[str, Any]:
    """Name -> type of every setting of ``kind`` that can be given."""
    hints = typing.get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind) if each.init}


def coerced_values(given: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Each value as the type that the setting has in ``kind``.

    A null stands for the default where the type has no null, as in published files.
    """
    hints = hints_of(kind)
    return {
        key: coerced(key, value, hints[key])
        for key, value in given.items()
        if value is not None or type(None) in typing.get_args(hints[key])
    }


def coerced(key: str, value: Any, hint: Any) -> Any:
    """``value`` as the field's type: 1e-6 as a number, whole numbers for floats, one for a list."""
    kinds = _kinds_of(key, hint)
    if value is None or not kinds & TYPES.keys():
        return value
    if float in kinds or int in kinds:
        value = as_number(value) if str not in kinds else value
        if float in kinds and type(value) is int and int not in kinds and abs(value) < 2**53:
            value = float(value)  # exact; larger ones are refused by what checks the setting
        if kinds & {int} and float not in kinds and type(value) is float and value.is_integer():
            value = int(value)
    if isinstance(value, dict) and key not in AS_WRITTEN:
        value = _with_numbers(value)
    if str in kinds and type(value) is datetime.date:
        value = value.isoformat()  # as it was written
    if list in kinds and isinstance(value, str) and LISTED.fullmatch(value):
        value = [part.strip() for part in value.split(",")]
    if list in kinds and isinstance(value, str) and str not in kinds:
        value = [value]
    if str in kinds and type(value) is bool and bool not in kinds and key.endswith("_strategy"):
        value = "steps" if value else "no"  # YAML 1.1 reads a bare no as false
    allowed = tuple(kinds | ({int} if float in kinds else set()))
    if isinstance(value, allowed) and not (type(value) is bool and bool not in kinds):
        return value
    if not kinds <= TYPES.keys():
        return value
    expected = " or ".join(sorted(TYPES[kind] for kind in kinds))
    got = "something else" if is_secret(key) else reprlib.repr(value)
    raise UserError(f"{key}: expected {expected}, got {got}{_remedy(kinds, hint, value)}")


def _with_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_numbers(part) for name, part in value.items()}
    return [*map(_with_numbers, value)] if isinstance(value, list) else as_number(value)


def _remedy(kinds: set[Any], hint: Any, value: Any) -> str:
    if str in kinds and not isinstance(value, list | dict):
        return "; write it in quotes"
    no_value = isinstance(value, str) and value.lower() == "none"
    return "; write null" if no_value and type(None) in typing.get_args(hint) else ""


def takes_text(key: str, hint: Any) -> bool:
    """Whether a setting of this type takes text alone, or null."""
    return _kinds_of(key, hint) == {str}


def _kinds_of(key: str, hint: Any) -> set[Any]:
    return set(_kinds(hint)) | ({bool} if key in OR_BOOL else set())


def is_secret(name: str) -> bool:
    """Whether a setting's value is for no log, by its name."""
    return name.endswith(("_token", "_key", "_password", "_secret"))


def as_number(value: Any) -> Any:
    """Text such as "1e-6", which YAML 1.1 does not read as a number, as one."""
    if not isinstance(value, str) or len(value) > LONGEST_NUMBER:
        return value
    if not NUMBER.fullmatch(value.strip()):
        return value
    number = int(value) if re.fullmatch(r"[-+]?\d+", value.strip()) else float(value)
    return number if math.isfinite(number) else value


def _kinds(hint: Any) -> Iterable[Any]:
    """The plain types in a hint; subscripted ones by their origin."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _kinds(part)
    elif origin is typing.Literal:
        yield from map(type, typing.get_args(hint))
    elif hint is not type(None):
        yield origin or hint
