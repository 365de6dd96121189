"""The settings that a sweep varies: parsed from the command line, multiplied, named."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..files import digest
from ..settings.files import joined

MOST_IN_NAME = 60
"""Characters of one value in a folder's name."""


@dataclass(frozen=True)
class Combination:
    """One run of a sweep: its values as text, by setting."""

    values: dict[str, str]

    @property
    def name(self) -> str:
        """A folder's name: ``learning_rate-5e-7_beta-2``."""
        parts = (f"{key}-{plain(value)}" for key, value in self.values.items())
        return "_".join(parts)

    @property
    def overrides(self) -> list[str]:
        return [f"--{key}={value}" for key, value in self.values.items()]


def plain(value: str) -> str:
    """The value with characters alone that a path and a shell take as they are.

    A negative number keeps its sign, and a value that is cut ends with its digest.
    """
    sign = "-" if re.match(r"-[\d.]", value) else ""
    text = sign + re.sub(r"[^\w.+-]+", "-", value).strip("-")
    if len(text) <= MOST_IN_NAME:
        return text
    return f"{text[: MOST_IN_NAME - 9]}-{digest([value], 4)}"


def pairs_of(arguments: Iterable[str]) -> list[tuple[str, str]]:
    """``--key=value`` and ``--key value`` as (key, value)."""
    pairs: list[tuple[str, str]] = []
    for argument in joined(arguments):
        key, equals, value = argument.partition("=")
        if not re.fullmatch(r"--[\w.-]+", key) or not equals:
            raise UserError(f"argument {key}: expected --key value,value, such as --beta 2,2.5")
        name = key.removeprefix("--").replace("-", "_")
        if name in dict(pairs):
            raise UserError(f"{name}: it is given twice; give its values once, as in 2,2.5")
        pairs.append((name, value))
    return pairs


def listed(value: str) -> list[str]:
    """The values in ``a,b``; commas inside brackets, braces and quotes part nothing."""
    values, depth, quote = [""], 0, ""
    for character in value:
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        depth += (character in "[{(") - (character in "]})") if not quote else 0
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
    return [each.strip() for each in values]


def combinations(arguments: Sequence[str]) -> tuple[list[Combination], list[str]]:
    """Every combination of the settings with several values, and the overrides with one.

    Raises:
        UserError: nothing varies, a value is there twice, or two runs would share a folder.
    """
    values = {key: listed(value) for key, value in pairs_of(arguments)}
    for key in (key for key, each in values.items() if "" in each and len(each) > 1):
        raise UserError(f"{key}: a value between commas is empty; write null for none")
    fixed = [f"--{key}={each[0]}" for key, each in values.items() if len(each) == 1]
    varied = {key: each for key, each in values.items() if len(each) > 1}
    if not varied:
        raise UserError("sweep: give a setting several values, such as --learning_rate 5e-7,1e-6")
    product = itertools.product(*varied.values())
    runs = [Combination(dict(zip(varied, each, strict=True))) for each in product]
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"sweep: two runs would be called {twice}; give each value once")
    return runs, fixed
