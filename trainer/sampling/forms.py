"""Pairs as rows of training data: of text, of token ids, as trees, or with labels.

Trees and labels come from the same pairs: a tree has the answers that are in a pair of its prompt,
and a label says on which side one is.
"""

from __future__ import annotations

from typing import Any

from ..data.formats.answers import SCORES
from ..evaluation.results import Record
from .selection import Chosen, Made

SIDES = ("chosen", "rejected")


def _text(prompt: Record, it: Made) -> Any:
    """An answer in the form of its prompt."""
    output = it.record["output"]
    talk = isinstance(prompt["prompt"], list)
    return [{"role": "assistant", "content": output}] if talk else output


def _asked(prompt: Record) -> Record:
    arguments = dict(prompt["arguments"])
    tools = {"tools": arguments.pop("tools")} if "tools" in arguments else {}
    others = {"chat_template_kwargs": arguments} if arguments else {}
    return {"prompt": prompt["prompt"], **tools, **others}


def _scores(two: Chosen) -> Record:
    return {name: it.score for name, it in zip(SCORES, two, strict=True)}


def _pair_rows(prompt: Record, pairs: list[Chosen]) -> list[Record]:
    return [
        {**_asked(prompt), "chosen": _text(prompt, two[0]), "rejected": _text(prompt, two[1])}
        | _scores(two)
        | {"prompt_id": prompt["id"]}
        for two in pairs
    ]


def _token_rows(prompt: Record, pairs: list[Chosen]) -> list[Record]:
    return [
        {"prompt_ids": prompt["token_ids"]}
        | {f"{side}_ids": it.record["token_ids"] for side, it in zip(SIDES, two, strict=True)}
        | _scores(two)
        | {"prompt_id": prompt["id"]}
        for two in pairs
    ]


def _members(pairs: list[Chosen], sides: tuple[int, ...] = (0, 1)) -> list[Made]:
    """The distinct answers of a prompt's pairs."""
    members = {it.record["id"]: it for two in pairs for it in (two[i] for i in sides)}
    return sorted(members.values(), key=lambda it: it.record["k"])


def _tree_rows(prompt: Record, pairs: list[Chosen]) -> list[Record]:
    members = _members(pairs)
    texts = [_text(prompt, it) for it in members]
    tree = {"completions": texts, "scores": [it.score for it in members]}
    return [_asked(prompt) | tree | {"prompt_id": prompt["id"]}]


def _kto_rows(prompt: Record, pairs: list[Chosen]) -> list[Record]:
    better = {it.record["id"] for it in _members(pairs, (0,))}
    return [
        {**_asked(prompt), "completion": _text(prompt, it), "label": it.record["id"] in better}
        | {"score": it.score, "prompt_id": prompt["id"]}
        for it in _members(pairs)
    ]


WRITERS = {"pairs": _pair_rows, "tokens": _token_rows, "trees": _tree_rows, "kto": _kto_rows}
"""Each makes rows of a prompt and its pairs."""
