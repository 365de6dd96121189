"""How a row of each kind of data set becomes one with prompt (or none), chosen and rejected.

A converter is given a row and the columns that `shapes` knows its kind by, in their order there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from operator import itemgetter
from typing import Any

from .messages import WRONG_TYPE, RowProblem, as_messages, kind

Row = dict[str, Any]
NO_PREFERENCE = "no preference between the answers"


def same(row: Row, *columns: str) -> Row:
    return {name: row[name] for name in columns}


def single(row: Row, prompt: str, completion: str, _: str) -> Row:
    """One answer, as both sides; `label_of` reads its label."""
    return {"prompt": row[prompt], "chosen": row[completion], "rejected": row[completion]}


def label_of(value: Any) -> float:
    """A label as 1 or 0: a boolean, a number, or text of either."""
    labels = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}
    label = labels.get(str(value).strip().casefold())
    if label is None:
        raise RowProblem(WRONG_TYPE, f"label is {value!r}, neither true nor false, 1 nor 0")
    return label


def asked(row: Row, column: str, chosen: str, rejected: str, *_: str) -> Row:
    """A question in ``column``, and two answers: a conversation."""
    question, sides = row[column], {"chosen": row[chosen], "rejected": row[rejected]}
    if all(opens(as_messages(side)) for side in sides.values()):
        return sides  # which hold the question
    extra = text(row, "input") if column == "instruction" else ""
    if isinstance(question, str) and extra:
        question = f"{question}\n{extra}"
    return conversation(question, **sides)


def text(row: Row, column: str) -> str:
    """The text of a column that may be absent, null or blank, which is "".

    Raises:
        RowProblem: it holds something else.
    """
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise RowProblem(WRONG_TYPE, f"{column} is {kind(value)}, not text")
    return value if value and value.strip() else ""


def conversation(prompt: Any, chosen: Any, rejected: Any) -> Row:
    if isinstance(as_messages(prompt), str):
        prompt = [{"role": "user", "content": prompt}]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def talk(row: Row, column: str, chosen: str, rejected: str) -> Row:
    """Messages before the answer in ``column``, unless the sides are conversations already."""
    prompt = as_messages(row[column])
    sides = {"chosen": row[chosen], "rejected": row[rejected]}
    if any(opens(as_messages(side)) for side in sides.values()):
        return sides
    answer = as_messages(row[chosen])
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if isinstance(prompt, list) and prompt[-1:] == answer:
        prompt = prompt[:-1]
    return {"prompt": prompt, **sides}


def opens(side: Any) -> bool:
    first = side[0] if isinstance(side, list) and side else None
    return isinstance(first, dict) and first.get("role") in ("user", "system", "human")


def swift_conversations(row: Row, chosen: str, rejected: str) -> Row:
    return {"chosen": row[chosen], "rejected": row[rejected]}


def swift(row: Row, messages: str, rejected: str) -> Row:
    talk = as_messages(row[messages])
    talk = talk if isinstance(talk, list) else []
    return {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": row[rejected]}


def either(row: Row, *columns: str, first_wins: Callable[[float], float]) -> Row:
    """A prompt, two answers and a verdict.

    ``first_wins`` of it is above 0 for the first, below for the second, 0 for none.
    """
    prompt, first, second, verdict = columns
    wins = first_wins(number(row, verdict))
    if not wins:
        raise RowProblem(NO_PREFERENCE)
    better, worse = (first, second) if wins > 0 else (second, first)
    return conversation(transcript(row[prompt]), row[better], row[worse])


def number(row: Mapping[str, Any], column: str) -> float:
    return finite(row.get(column), column)


def finite(value: Any, column: str) -> float:
    """A value of ``column`` as a number, of text too; ``RowProblem`` for another."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RowProblem(WRONG_TYPE, f"{column} has something {kind(value)}, no number") from None
    if not math.isfinite(number):
        raise RowProblem(WRONG_TYPE, f"{column} has {number}, no finite number")
    return number


def arena(row: Row, first: str, second: str, verdict: str) -> Row:
    winner = row[verdict]
    if winner is None or "tie" in str(winner) or "both" in str(winner):
        raise RowProblem(NO_PREFERENCE, f"winner is {winner!r}")
    if winner not in ("model_a", "model_b"):
        raise RowProblem(WRONG_TYPE, f"winner is {winner!r}, neither model_a nor model_b")
    better, worse = (first, second) if winner == "model_a" else (second, first)
    return {"chosen": _judged(row, better), "rejected": _judged(row, worse)}


def _judged(row: Row, side: str) -> Any:
    """The conversation up to the judged turn: MT-Bench's go on after a judged first one."""
    talk = as_messages(row[side])
    if row.get("turn") is None or not isinstance(talk, list):
        return talk
    return talk[: 2 * int(number(row, "turn"))]


def begun(row: Row, prompt: str, before: str, chosen: str, rejected: str) -> Row:
    """Step-DPO's rows: both sides go on from the steps before them."""
    steps = text(row, before)
    standard = conversation(row[prompt], row[chosen], row[rejected])
    if steps:
        standard["prompt"] = [*standard["prompt"], {"role": "assistant", "content": steps}]
    return standard


_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = "\n<extra_id_1>"


def transcript(text: Any) -> Any:
    """A text of several turns as messages; another value as it is.

    The turns begin with ``Human:`` and ``Assistant:``, or as in HelpSteer2, whose first one has no
    mark.
    """
    if not isinstance(text, str):
        return text
    if f"{_TURN}Assistant\n" in text:
        turns = (turn.partition("\n") for turn in f"User\n{text}".split(_TURN))
        return [{"role": role.lower(), "content": said.strip()} for role, _, said in turns]
    if not text.lstrip().startswith(_HUMAN.strip()):
        return text
    messages = []
    for turn in f"\n\n{text.strip()}".split(_HUMAN)[1:]:
        asked, *answers = turn.split(_ASSISTANT)
        messages.append({"role": "user", "content": asked.strip()})
        messages += [{"role": "assistant", "content": a.strip()} for a in answers if a.strip()]
    return messages


def grouped(row: Row, *_: str) -> Row:
    raise RowProblem(WRONG_TYPE, "HelpSteer's rows are paired before they are read")


def best_and_worst(rows: list[Mapping[str, Any]]) -> list[Row]:
    """HelpSteer's rows, one an answer, as pairs: of each prompt the most and the least helpful."""
    answers: dict[str, list[tuple[float, Any]]] = {}
    for row in rows:
        with suppress(RowProblem):  # an answer without a score
            score = number(row, "helpfulness")
            answers.setdefault(str(row["prompt"]), []).append((score, row["response"]))
    pairs = []
    for prompt, scored in answers.items():
        scored.sort(key=itemgetter(0))
        (least, rejected), (most, chosen) = scored[0], scored[-1]
        if least != most:
            pairs.append(conversation(transcript(prompt), chosen, rejected))
    return pairs
