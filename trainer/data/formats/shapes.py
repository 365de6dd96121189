"""Data sets known by their columns: each row of theirs as one with prompt, chosen and rejected.

`SHAPES` is the table; the first whose columns are all there is the data set's. A system text and
earlier turns in columns of their own go before the prompt, which makes the row a conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any

from .answers import IN_COLUMNS, NUMBERS, Edges, Scored, beside, in_columns, inside, rows_of
from .converters import (
    Row,
    arena,
    asked,
    begun,
    conversation,
    either,
    grouped,
    opens,
    same,
    single,
    swift,
    swift_conversations,
    talk,
    text,
)
from .messages import MISSING, WRONG_TYPE, RowProblem, as_messages, from_json, kind, without_nulls

SYSTEM = ("system", "system_prompt")
BEFORE = (*SYSTEM, "history")
ARGUMENTS = ("tools", "chat_template_kwargs")
PROMPT_LIKE = ("question", "instruction", "query", "input", "context", "problem", "text", "user")
"""Columns that hold a prompt under another name, as often as not."""
IMAGE_COLUMNS = ("images", "image")


@dataclass(frozen=True)
class Shape:
    """A kind of data set.

    Args:
        name: what reports call it; "" for prompt, chosen and rejected themselves.
        needs: the columns it is known by.
        standard: a row and ``needs`` -> the row with prompt (or none), chosen and rejected.
        also: further columns that it reads where they are there.
        answers: in place of ``standard``, a row and ``needs`` -> a prompt, and answers with scores.
    """

    name: str
    needs: tuple[str, ...]
    standard: Callable[..., Row] | None = None
    also: tuple[str, ...] = ()
    answers: Callable[..., tuple[Any, list[Scored]]] | None = None

    def reads(self, columns: Collection[str]) -> list[str]:
        """Those of ``columns`` that become tokens."""
        known = {*self.needs, *self.also, *BEFORE, *ARGUMENTS, *NUMBERS, *IMAGE_COLUMNS}
        return [column for column in columns if column in known]

    def rows(self, row: Row, edges: Edges) -> list[Row]:
        """The pairs of ``row`` with prompt (or none), chosen, rejected, `ARGUMENTS` and images."""
        if self.answers is not None:
            pairs = rows_of(*self.answers(row, *self.needs), edges)
        else:
            assert self.standard is not None
            pairs = [self.standard(row, *self.needs)]
        return [self._complete(pair, row) for pair in pairs]

    def _complete(self, standard: Row, row: Row) -> Row:
        asks = "history" in self.needs  # where it is the question
        before = _system(row) + ([] if asks else _history(row.get("history")))
        if any(column in row for column in (SYSTEM if asks else BEFORE)):
            standard = _after(before, standard)
        beside = (*ARGUMENTS, *IMAGE_COLUMNS)
        return standard | {name: row[name] for name in beside if name in row}


def _system(row: Row) -> list[Row]:
    texts = [text(row, name) for name in SYSTEM]
    return [{"role": "system", "content": said} for said in texts if said][:1]


def _history(value: Any) -> list[Row]:
    """Earlier turns: messages, or pairs of a question and an answer."""
    turns = as_messages(from_json(value)) or []
    if not isinstance(turns, list):
        raise RowProblem(WRONG_TYPE, f"history is {kind(turns)}")
    messages = []
    for turn in turns:
        if isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn):
            roles = ("user", "assistant")
            messages += [{"role": r, "content": t} for r, t in zip(roles, turn, strict=True)]
        elif isinstance(turn, dict):
            messages.append(turn)
        else:
            raise RowProblem(WRONG_TYPE, "history is neither messages nor pairs of texts")
    return messages


def _after(before: list[Row], row: Row) -> Row:
    """``row`` as a conversation that goes on from ``before``."""
    prompt = as_messages(row.get("prompt"))
    if isinstance(prompt, str):
        row = conversation(prompt, row["chosen"], row["rejected"])
        prompt = row["prompt"]
    sides = {name: as_messages(row[name]) for name in ("chosen", "rejected")}
    led = {name: _led(before, side) for name, side in sides.items() if opens(side)}
    if isinstance(prompt, list):
        led["prompt"] = _led(before, prompt)
    if before and not led:
        raise RowProblem(MISSING, "a system text or history stands beside answers with no prompt")
    return row | led


def _led(before: list[Row], messages: list[Row]) -> list[Row]:
    begins = (
        bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    )
    return (
        before[1:] if begins and before and before[0]["role"] == "system" else before
    ) + messages


GROUPED = ("prompt", "response", "helpfulness")
SINGLE = ("prompt", "completion", "label")
SHAPES = (
    Shape("Step-DPO", ("prompt", "initial_reason_steps", "chosen", "rejected"), begun),
    Shape("", ("prompt", "chosen", "rejected"), same),
    *(
        Shape("ShareGPT", (column, "chosen", "rejected"), talk)
        for column in ("conversations", "conversation", "messages")
    ),
    *(
        Shape("responses to messages", (column, "chosen_response", "rejected_response"), talk)
        for column in ("messages", "conversations")
    ),
    Shape("ms-swift", ("messages", "rejected_response"), swift),
    Shape("ms-swift", ("messages", "rejected_messages"), swift_conversations),
    Shape("orca_dpo", ("question", "chosen", "rejected"), asked),
    Shape("Alpaca", ("instruction", "chosen", "rejected"), asked, also=("input",)),
    Shape("orca_dpo", ("input", "chosen", "rejected", "system"), asked),
    Shape(
        "UltraFeedback, binarized", ("instruction", "chosen_response", "rejected_response"), asked
    ),
    Shape(
        "UltraFeedback",
        ("instruction", "completions"),
        answers=partial(
            inside, text="response", worth=("fine-grained_score", "overall_score", "score")
        ),
    ),
    Shape(
        "Nectar",
        ("prompt", "answers"),
        answers=partial(inside, text="answer", worth=("rank",), sign=-1),
    ),
    Shape(
        "answers with scores",
        ("prompt", "completions", "scores"),
        answers=partial(beside, talk=False),
    ),
    Shape(
        "answers with ranks",
        ("prompt", "completions", "ranks"),
        answers=partial(beside, sign=-1, talk=False),
    ),
    Shape(
        "SimPO's answers with a reward model's scores",
        ("prompt", "all_generated_responses", "all_rm_scores"),
        answers=beside,
    ),
    Shape("RRHF", ("query", "responses", "scores"), answers=beside),
    Shape("distilabel", ("instruction", "generations", "ratings"), answers=beside),
    Shape(
        "NCA",
        ("prompt", "A0", "A1", "A0_score", "A1_score"),
        also=tuple(chain.from_iterable(IN_COLUMNS)),
        answers=in_columns,
    ),
    *(
        Shape("answers, the best first", (column, "responses"), answers=beside)
        for column in ("prompt", "instruction", "query")
    ),
    Shape("single answers with labels", SINGLE, single),
    Shape(
        "HelpSteer2 with preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        partial(either, first_wins=lambda strength: -strength),
    ),
    Shape(
        "HelpSteer3",
        ("context", "response1", "response2", "overall_preference"),
        partial(either, first_wins=lambda preference: -preference),
    ),
    Shape("HelpSteer, the most and the least helpful", GROUPED, grouped),
    Shape(
        "PKU-SafeRLHF",
        ("prompt", "response_0", "response_1", "better_response_id"),
        partial(either, first_wins=lambda better: 0.5 - better),
    ),
    Shape(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        partial(either, first_wins=lambda label: label - 0.5),
    ),
    Shape("StackExchange", ("question", "response_j", "response_k"), asked),
    Shape("arena", ("conversation_a", "conversation_b", "winner"), arena, also=("turn",)),
    Shape("", ("chosen", "rejected"), same),
)


@lru_cache
def shape_of(columns: tuple[str, ...], several: bool = False) -> Shape | None:
    """The shape of a data set with these columns, or None.

    Where it has a pair and several answers, ``several`` says that the answers count.
    """
    shapes = [shape for shape in SHAPES if set(shape.needs) <= set(columns)]
    if several:
        shapes.sort(key=lambda shape: shape.answers is None)
    return next(iter(shapes), None)


def standard_rows(row: Row, edges: Edges) -> list[Row]:
    """The pairs of a row of a data set of any of `SHAPES`, with the columns that `rows` reads."""
    shape = shape_of(tuple(row))
    return [row] if shape is None else shape.rows(row, edges)


def arguments_of(row: Row) -> dict[str, Any]:
    """What a row gives the chat template beside its messages.

    Raises:
        RowProblem: a column that holds something else.
    """
    given = (None if row.get(name) in ("", "null") else row.get(name) for name in ARGUMENTS)
    tools, others = (without_nulls(from_json(value)) for value in given)
    tools = [from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(t, dict) for t in tools)
    ):
        raise RowProblem(WRONG_TYPE, f"tools is {kind(tools)}, not a list of functions")
    if others is not None and not isinstance(others, dict):
        raise RowProblem(WRONG_TYPE, f"chat_template_kwargs is {kind(others)}, not a mapping")
    return dict(others or {}) | ({"tools": tools} if tools else {})
