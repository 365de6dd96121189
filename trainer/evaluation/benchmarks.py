"""AlpacaEval 2 and Arena-Hard: answers in exactly the files that their tools read.

``options`` are the command line's, see `evaluate_command`.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError, expect_whole
from ..monitor.run_record import versions
from ..text import printable
from . import judging, tools
from .answering import answer, length_lines, length_report
from .questions import (
    Question,
    alpaca_outputs,
    alpaca_questions,
    arena_outputs,
    arena_questions,
    is_first_layout,
)
from .results import Record, name, output_folder, write_json, write_jsonl
from .settings import AnswerSettings, answer_settings

ALPACA_QUESTIONS = "tatsu-lab/alpaca_eval:alpaca_eval.json"
ARENA_QUESTIONS = "lmarena-ai/arena-hard-auto:data/arena-hard-v2.0/question.jsonl"
FIRST_VERSION, SECOND_VERSION = "arena-hard-v0.1", "arena-hard-v2.0"
_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def alpaca_eval(options: argparse.Namespace, overrides: list[str]) -> None:
    """Answer AlpacaEval's instructions, write ``model_outputs.json``, and have it judged."""
    settings, model, generator = _settings(options, "alpaca_eval", overrides)
    questions = _questions(options, settings, alpaca_questions, ALPACA_QUESTIONS)
    judge = _judge(options, alpaca_outputs)
    folder = output_folder(model, "alpaca-eval", options.out)
    records = answer(questions, settings, model, folder)
    path = folder / "model_outputs.json"
    write_json(path, alpaca_rows(questions, records, generator))
    _report(folder, "AlpacaEval 2", generator, settings, records, path)
    if judge.model is not None:
        judging.judge(judge, folder, questions, records, alpaca_outputs, "AlpacaEval 2")
    else:
        tools.alpaca_eval(path, judge.url, judge.baseline, call=not options.no_judge)


def arena_hard(options: argparse.Namespace, overrides: list[str]) -> None:
    """Answer Arena-Hard's questions, write its answer file, and have it judged."""
    settings, model, generator = _settings(options, "arena_hard", overrides)
    questions = _questions(options, settings, arena_questions, ARENA_QUESTIONS)
    judge = _judge(options, arena_outputs)
    version = arena_version(questions)
    for option, value in (("--judge-url", judge.url), ("--baseline", judge.baseline)):
        if value is not None and judge.model is None:
            raise UserError(
                f"{option}: Arena-Hard's own tool has its endpoints in config/api_config.yaml and "
                "its baseline in its settings; give --judge-model too to judge here"
            )
    clone = options.arena_hard_dir
    if clone is not None:
        tools.check_arena_hard(clone, version)
    folder = output_folder(model, version, options.out)
    records = answer(questions, settings, model, folder)
    path = folder / version / "model_answer" / f"{generator}.jsonl"
    write_jsonl(path, arena_rows(questions, records, generator, version, settings.system_prompt))
    _report(folder, version, generator, settings, records, path)
    if judge.model is not None:
        judging.judge(judge, folder, questions, records, arena_outputs, version)
        return
    categories = list(dict.fromkeys(str(q.row.get("category", version)) for q in questions))
    tools.arena_hard(clone, path, version, generator, categories, call=not options.no_judge)


def alpaca_rows(
    questions: Sequence[Question], records: Sequence[Record], generator: str
) -> list[Record]:
    """``model_outputs.json``, which AlpacaEval joins with its baseline by ``instruction``."""
    return [
        {
            "dataset": question.row.get("dataset", ""),
            "instruction": question.prompt,
            "output": record["output"].strip(),
            "generator": generator,
        }
        for question, record in zip(questions, records, strict=True)
    ]


def arena_rows(
    questions: Sequence[Question],
    records: Sequence[Record],
    model: str,
    version: str,
    system_prompt: str | None = None,
) -> list[Record]:
    """An answer file of Arena-Hard, ordered by id.

    Its style control reads ``metadata`` (v2.0); ``token_len`` there counts the model's tokens.
    """
    rows = []
    pairs = sorted(zip(questions, records, strict=True), key=lambda pair: pair[0].id)
    for question, record in pairs:
        text = record["output"]
        answer_id = _answer_id(model, question.id, text)
        style = {"token_len": record["tokens"], **markdown_counts(text)}
        if is_first_layout(question.row):
            rows.append(
                {
                    "question_id": question.id,
                    "answer_id": answer_id,
                    "model_id": model,
                    "choices": [{"index": 0, "turns": [{"content": text}]}],
                    "tstamp": record["tstamp"],
                    "conv_metadata": style,
                }
            )
            continue
        opening = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        row = {
            "uid": question.id,
            "ans_id": answer_id,
            "model": model,
            "messages": [
                *opening,
                {"role": "user", "content": question.prompt},
                {"role": "assistant", "content": {"answer": text}},
            ],
            "tstamp": record["tstamp"],
        }
        rows.append(row | ({"metadata": style} if version == SECOND_VERSION else {}))
    return rows


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold passages outside of code, as Arena-Hard counts them."""
    for code in re.findall(r"```([^`]*)```", text):
        text = text.replace(code, "")

    def matches(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{n}": matches(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": matches(r"^\s*\d+\.\s"), "unordered": matches(r"^\s*[-*+]\s")},
        "bold_count": {"**": matches(r"\*\*[^*\n]+\*\*"), "__": matches(r"__[^_\n]+__")},
    }


def arena_version(questions: Sequence[Question]) -> str:
    """The version of Arena-Hard that the questions are of."""
    first = all(
        is_first_layout(q.row) or q.row.get("category") == FIRST_VERSION or "cluster" in q.row
        for q in questions
    )
    return FIRST_VERSION if first else SECOND_VERSION


def _answer_id(*parts: str) -> str:
    """22 characters as short ids have, the same for the same answer."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).digest()
    number = int.from_bytes(digest, "big")
    letters = []
    for _ in range(22):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)


def _settings(
    options: argparse.Namespace, section: str, overrides: list[str]
) -> tuple[AnswerSettings, str, str]:
    """The settings, the model and the name under which it answers."""
    settings = answer_settings(options.config, section, overrides)
    model = options.model or settings.model_name_or_path
    if not model:
        raise UserError("model: none is given; set --model to a folder or a hub name")
    generator = settings.generator or name(model)
    if not generator.strip(".") or "/" in generator or "\\" in generator:
        raise UserError(f"generator: {generator!r} cannot be a file's name; set generator: to one")
    return settings, model, generator


def _judge(
    options: argparse.Namespace, read_baseline: Callable[[str], dict[str, str]]
) -> judging.JudgeRequest:
    request = judging.JudgeRequest(
        options.judge_model, options.judge_url, options.baseline, options.judge_parallel
    )
    request.check(read_baseline)
    return request


def _questions(
    options: argparse.Namespace,
    settings: AnswerSettings,
    read: Callable[[str], list[Question]],
    usual: str,
) -> list[Question]:
    if options.limit is not None:
        expect_whole("--limit", options.limit, 1)
    return read(options.questions or settings.questions or usual)[: options.limit]


def _report(
    folder: Path,
    benchmark: str,
    generator: str,
    settings: AnswerSettings,
    records: Sequence[Record],
    path: Path,
) -> None:
    lengths = length_report(records)
    content = {
        "benchmark": benchmark,
        "generator": generator,
        "decoding": {
            option: getattr(settings, option)
            for option in ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
        },
        "lengths": lengths,
        "versions": versions(),
    }
    write_json(folder / "lengths.json", content)
    print(f"{benchmark}, {printable(generator)}: " + "\n".join(length_lines(lengths)))
    print(f"Written: {path}")
