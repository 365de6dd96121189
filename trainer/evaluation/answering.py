"""A model's answers to questions: rendered, batched by length, kept as they are finished."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import chat
from ..data.encoder import encode
from ..data.rows import RowProblem
from ..errors import UserError
from ..model.generation import context_of
from ..model.loading import load_model_config
from ..text import printable
from .answer_engines import VLLM_AT_ONCE, engine_name, make_engine
from .models import dtype_of, fingerprint, model_settings, read_tokenizer
from .questions import Question
from .results import Record, Records
from .settings import AnswerSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "prompt too long"


def answer(
    questions: Sequence[Question], settings: AnswerSettings, model: str, folder: Path
) -> list[Record]:
    """The model's answer to each question, in their order; those in ``folder`` already are kept.

    A record has ``id``, ``output`` (text), ``tokens``, ``finish`` ("stop", "length" or
    "prompt too long") and ``tstamp`` (seconds since 1970, when it was finished). Batches depend on
    the questions and settings alone, and each has a seed, so a run that was stopped and continued
    gives the same answers as an uninterrupted one.
    """
    tokenizer = read_tokenizer(settings, model, settings.chat_template)
    engine = engine_name(settings, model)
    with Records(folder, "answers", _identity(questions, settings, model, engine)) as records:
        if records.done:
            print(f"{len(records.done):,} of {len(questions):,} answers are in {folder} already")
        if len(records.done) < len(questions):
            _answer_rest(questions, settings, model, tokenizer, engine, records)
        return [records.done[question.id] for question in questions]


def _identity(
    questions: Sequence[Question], settings: AnswerSettings, model: str, engine: str
) -> Record:
    """Everything that answers depend on."""
    texts = json.dumps([[question.id, question.prompt] for question in questions])
    shown = asdict(settings) | {"model_name_or_path": model, "engine": engine}
    del shown["generator"], shown["device"]
    return shown | {
        "dtype": dtype_of(settings),
        "questions": len(questions),
        "questions_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "model_fingerprint": fingerprint(settings, model),
    }


def _answer_rest(
    questions: Sequence[Question],
    settings: AnswerSettings,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    engine_name: str,
    records: Records,
) -> None:
    from tqdm.auto import tqdm

    prompts = render(questions, settings, tokenizer)
    context = context_of(load_model_config(model_settings(settings, model)))
    fits = [context is None or len(prompt) < context for prompt in prompts]
    records.append(
        _record(question, "", 0, TOO_LONG)
        for question, fit in zip(questions, fits, strict=True)
        if not fit
    )
    lengths = [len(prompt) if fit else 0 for prompt, fit in zip(prompts, fits, strict=True)]
    size = VLLM_AT_ONCE if engine_name == "vllm" else settings.batch_size
    engine = None
    with tqdm(
        total=len(questions), initial=len(records.done), unit="question", disable=None
    ) as bar:
        for number, batch in enumerate(batches(lengths, size)):
            if all(questions[i].id in records.done for i in batch):
                continue
            engine = engine or make_engine(engine_name, model, settings, tokenizer)
            completions = engine.complete(
                [prompts[i] for i in batch], (settings.seed + 1_000_003 * number) % 2**31
            )
            texts = tokenizer.batch_decode(
                [completion.token_ids for completion in completions], skip_special_tokens=True
            )
            records.append(
                _record(
                    questions[i], text, len(done.token_ids), "stop" if done.stopped else "length"
                )
                for i, text, done in zip(batch, texts, completions, strict=True)
            )
            bar.update(len(records.done) - bar.n)


def _record(question: Question, output: str, tokens: int, finish: str) -> Record:
    tstamp = round(time.time(), 3)
    return {
        "id": question.id,
        "output": output,
        "tokens": tokens,
        "finish": finish,
        "tstamp": tstamp,
    }


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of the lengths above 0, the longest first, ``size`` at a time."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def render(
    questions: Sequence[Question],
    settings: AnswerSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Each question in the chat template, up to where the answer begins, as tokens."""
    system = settings.system_prompt
    opening = [] if system is None else [{"role": "system", "content": system}]
    texts = chat.render(
        tokenizer,
        [[*opening, {"role": "user", "content": question.prompt}] for question in questions],
        generation=True,
    )
    for question, text in zip(questions, texts, strict=True):
        if isinstance(text, RowProblem):
            why = printable(f"question {question.id}: {text.reason} ({text.detail})", 300)
            raise UserError(
                f"{why}; set chat_template: to one that takes it, or leave out system_prompt"
            )
    return encode(tokenizer, [str(text) for text in texts])


def length_report(records: Sequence[Record]) -> dict[str, Any]:
    """How long answers are, in characters and the model's tokens; how many did not end."""
    report: dict[str, Any] = {"questions": len(records)}
    for unit, values in (
        ("characters", [len(record["output"]) for record in records]),
        ("tokens", [record["tokens"] for record in records]),
    ):
        report[unit] = {
            "mean": statistics.fmean(values),
            "median": float(statistics.median(values)),
            "max": max(values),
        }
    report["cut_at_max_new_tokens"] = sum(record["finish"] == "length" for record in records)
    report["prompt_too_long"] = sum(record["finish"] == TOO_LONG for record in records)
    report["empty"] = sum(not record["output"].strip() for record in records)
    return report


def length_lines(report: dict[str, Any]) -> list[str]:
    """`length_report` for the terminal."""
    total = report["questions"]
    lines = [f"{total:,} answers"]
    for unit in ("characters", "tokens"):
        stats = report[unit]
        lines.append(
            f"  {unit}: mean {stats['mean']:,.0f}, median {stats['median']:,.0f}, "
            f"max {stats['max']:,}"
        )
    for name in ("cut_at_max_new_tokens", "prompt_too_long", "empty"):
        if report[name]:
            lines.append(f"  {name.replace('_', ' ')}: {report[name]:,} of {total:,}")
    return lines
