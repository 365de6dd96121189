"""The benchmarks' question files, and answers to them by other models.

AlpacaEval: a JSON list of objects with ``instruction`` and ``dataset`` (a model's outputs have
``output`` and ``generator`` too). Arena-Hard: an object a line with ``uid``, ``category`` and
``prompt``; its first versions had ``question_id`` and ``turns`` instead.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import parse_json
from ..text import printable

Row = dict[str, Any]
_BLANK = re.compile(r"[ \t\r\n]*")
_HUB = re.compile(r"([\w.-]+/[\w.-]+):([\w./-]+)")


@dataclass(frozen=True)
class Question:
    """One question: its id in the benchmark (AlpacaEval: its place), its text, the file's row."""

    id: str
    prompt: str
    row: Row


def alpaca_questions(source: str) -> list[Question]:
    """The instructions of an AlpacaEval file; ``source`` as in `read_file`."""
    questions = []
    for where, row in _list_items(source):
        instruction = _text(where, row, "instruction")
        if not isinstance(row.get("dataset", ""), str):
            raise UserError(f"{where}: dataset: expected text, got {_shown(row['dataset'])}")
        questions.append(Question(str(len(questions)), instruction, row))
    return questions


def arena_questions(source: str) -> list[Question]:
    """The questions of an Arena-Hard file; ``source`` as in `read_file`."""
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for where, row in _lines(source):
        key = _text(where, row, "question_id" if is_first_layout(row) else "uid")
        if key in seen:
            raise UserError(f"{where}: {_shown(key)} is on {seen[key]} already; ids must differ")
        seen[key] = where.rpartition(", ")[2]
        prompt = _first_turn(where, row) if "turns" in row else _text(where, row, "prompt")
        questions.append(Question(key, prompt, row))
    return questions


def is_first_layout(row: Row) -> bool:
    """Whether an Arena-Hard row is of its first versions, with ``question_id`` for ``uid``."""
    return "question_id" in row and "uid" not in row


def alpaca_outputs(source: str) -> dict[str, str]:
    """Instruction -> output of a ``model_outputs.json``."""
    return {
        _text(where, row, "instruction"): _text(where, row, "output", empty=True)
        for where, row in _list_items(source)
    }


def arena_outputs(source: str) -> dict[str, str]:
    """Question id -> answer of an Arena-Hard answer file, in any of its layouts."""
    answers = {}
    for where, row in _lines(source):
        try:
            if is_first_layout(row):
                key, text = row["question_id"], row["choices"][0]["turns"][0]["content"]
            else:
                key, text = row["uid"], row["messages"][-1]["content"]["answer"]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{where}: no Arena-Hard answer (it lacks {error})") from error
        if not isinstance(key, str) or not isinstance(text, str):
            raise UserError(f"{where}: expected an id and an answer as text")
        answers[key] = text
    return answers


def read_file(source: str) -> str:
    """The text of a file, gzipped or not.

    ``source`` is a path, or ``owner/data:path/in/it`` for a data set's file on the hub.
    """
    path = Path(source).expanduser()
    hub = _HUB.fullmatch(source)
    if hub and not path.exists():
        path = _from_hub(source, *hub.groups())
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise UserError(f"{source}: cannot be read (it is not a file); give a file's path")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{source}, line {line}: not UTF-8 text") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{source}: cannot be read ({reason}); give a file's path") from error
    return text.removeprefix("\ufeff")


def _from_hub(source: str, repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except Exception as error:  # connection, permission, absence: a dozen types, one meaning
        raise UserError(
            f"{source}: the hub did not give it ({type(error).__name__}); give the path of a copy "
            "(--questions, --baseline)"
        ) from error


def _list_items(source: str) -> Iterator[tuple[str, Row]]:
    """The objects of a JSON list, each with where it begins, for messages."""
    text = read_file(source)
    decoder = json.JSONDecoder()

    def skip_blank(position: int) -> int:
        match = _BLANK.match(text, position)
        return match.end() if match else position

    def where(position: int) -> str:
        return f"{source}, line {text.count(chr(10), 0, position) + 1}"

    position = skip_blank(0)
    if text[position : position + 1] != "[":
        raise UserError(f"{where(position)}: expected a JSON list of objects")
    position = skip_blank(position + 1)
    items = 0
    while text[position : position + 1] != "]":
        try:
            row, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{where(error.pos)}: not valid JSON: {error.msg}") from error
        except (RecursionError, ValueError):
            raise UserError(f"{where(position)}: not valid JSON: too deep, or too long") from None
        items += 1
        yield f"{where(position)} (item {items})", _object(where(position), row)
        position = skip_blank(end)
        if text[position : position + 1] == ",":
            position = skip_blank(position + 1)
        elif text[position : position + 1] != "]":
            raise UserError(f"{where(position)}: not valid JSON: expected a comma or the end")
    if not items:
        raise UserError(f"{source}: the list is empty")
    if text[position + 1 :].strip():
        raise UserError(f"{where(skip_blank(position + 1))}: there is something after the list")


def _lines(source: str) -> Iterator[tuple[str, Row]]:
    """The objects of a JSONL file, each with its line, for messages."""
    lines = [pair for pair in enumerate(read_file(source).split("\n"), 1) if pair[1].strip()]
    if not lines:
        raise UserError(f"{source}: the file is empty")
    for number, line in lines:
        where = f"{source}, line {number}"
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error.msg}") from error
        yield where, _object(where, row)


def _object(where: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, got {_shown(row)}")
    return row


def _first_turn(where: str, row: Row) -> str:
    turns = row["turns"]
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], dict):
        raise UserError(f"{where}: turns: expected a list of one turn, got {_shown(turns)}")
    return _text(where, turns[0], "content")


def _text(where: str, row: Row, key: str, *, empty: bool = False) -> str:
    if key not in row:
        raise UserError(f"{where}: {key} is missing (found: {_shown(', '.join(row))})")
    value = row[key]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise UserError(f"{where}: {key}: expected text, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) and value else repr(value), 60)
