"""Rows with several answers to a prompt: the pairs that their scores or ranks make of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .converters import NO_PREFERENCE, Row, conversation, finite, number, transcript
from .messages import MISSING, WRONG_TYPE, RowProblem, from_json, kind

Scored = tuple[float, Any]
"""A score, higher for a better answer, and the answer."""

SCORES = ("score_chosen", "score_rejected")
"""Columns of a pair's scores."""

NUMBERS = {
    "weight": "each pair's loss is multiplied by it",
    "margin": "margin_from: margin adds it to each pair's target margin",
    SCORES[0]: "only margin_from: scores and listwise objectives use it",
    SCORES[1]: "only margin_from: scores and listwise objectives use it",
}
"""Columns of numbers that say something of a pair, and what becomes of them."""

DESIRABLE = "desirable"
"""The table's column of labels, 1 or 0; a row that has one is a single answer, on both sides."""

NUMBER_COLUMNS = (*NUMBERS, DESIRABLE)


@dataclass(frozen=True)
class Edges:
    """Which answers of a prompt make a pair; answers of equal scores never do.

    Args:
        kind: one of `settings.data.EDGES`.
        gap: of scores, the least that makes a pair, for "above-gap".
    """

    kind: str = "best-vs-rest"
    gap: float = 0.0

    def of(self, answers: list[Scored]) -> list[tuple[Scored, Scored]]:
        """The pairs, the better answer first; `RowProblem` where there are none."""
        pairs = [(a, b) for a, b in self._candidates(answers) if a[0] > b[0]]
        if not pairs:
            raise RowProblem(NO_PREFERENCE, f"{len(answers)} answers, none better than another")
        return pairs

    def _candidates(self, answers: list[Scored]) -> Iterator[tuple[Scored, Scored]]:
        ordered = sorted(answers, key=lambda answer: -answer[0])
        if self.kind == "best-vs-rest":
            yield from ((ordered[0], other) for other in ordered[1:])
        elif self.kind == "best-worst":
            yield ordered[0], next(a for a in ordered if a[0] == ordered[-1][0])
        elif self.kind == "adjacent":
            yield from pairwise(ordered)
        else:
            least = self.gap if self.kind == "above-gap" else 0.0
            for place, better in enumerate(ordered):
                yield from ((better, a) for a in ordered[place + 1 :] if better[0] - a[0] >= least)


def rows_of(prompt: Any, answers: list[Scored], edges: Edges) -> list[Row]:
    """Rows with prompt, chosen, rejected and `SCORES`, of answers to one prompt."""
    if not answers:
        raise RowProblem(MISSING, "no answer has a score")
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, SCORES[0]: high, SCORES[1]: low}
        for (high, chosen), (low, rejected) in edges.of(answers)
    ]


def beside(
    row: Row,
    prompt: str,
    answers: str,
    scores: str | None = None,
    *,
    sign: int = 1,
    talk: bool = True,
) -> tuple[Any, list[Scored]]:
    """A list of answers, and a list of their scores (or, with sign -1, ranks) in another column.

    Without ``scores`` the best answer comes first. With ``talk`` a text prompt is a user message.
    """
    listed = _list(row, answers)
    if scores is None:
        values: list[Any] = list(range(0, -len(listed), -1))
    else:
        values = [None if v is None else sign * finite(v, scores) for v in _list(row, scores)]
    if len(values) != len(listed):
        raise RowProblem(
            WRONG_TYPE, f"{answers} has {len(listed)} answers and {scores} {len(values)}"
        )
    scored = [(float(v), a) for v, a in zip(values, listed, strict=True) if v is not None]
    return _question(row[prompt]) if talk else row[prompt], scored


def inside(
    row: Row, prompt: str, answers: str, *, text: str, worth: tuple[str, ...], sign: int = 1
) -> tuple[Any, list[Scored]]:
    """A list of answers that each hold their text and their score.

    It is the one of ``worth`` that most answers have, the first of several.
    """
    listed = _list(row, answers)
    for answer in listed:
        if not isinstance(answer, dict):
            raise RowProblem(WRONG_TYPE, f"{answers} has something {kind(answer)}, no mapping")
    having = {name: [a for a in listed if a.get(name) is not None] for name in worth}
    column = max(worth, key=lambda name: len(having[name]))
    if not having[column]:
        raise RowProblem(MISSING, f"{answers} has no answer with {' or '.join(worth)}")
    scored = [(sign * finite(a[column], column), a.get(text)) for a in having[column]]
    return _question(row[prompt]), scored


IN_COLUMNS = [(f"A{i}", f"A{i}_score") for i in range(32)]
"""NCA's columns of answers and of their scores."""


def in_columns(row: Row, prompt: str, *_: str) -> tuple[Any, list[Scored]]:
    """Answers in columns with their scores."""
    there = [(a, score) for a, score in IN_COLUMNS if row.get(a) is not None]
    return _question(row[prompt]), [(number(row, score), row[a]) for a, score in there]


def _question(prompt: Any) -> Any:
    """A prompt of text as messages; another as it is."""
    return conversation(transcript(prompt), None, None)["prompt"]


def _list(row: Row, column: str) -> list[Any]:
    value = from_json(row[column])
    if not isinstance(value, list):
        raise RowProblem(WRONG_TYPE, f"{column} is {kind(value)}, not a list")
    return value
