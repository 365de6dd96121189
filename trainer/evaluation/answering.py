"""A model's answers to questions: rendered, batched by length, kept as they are finished."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..data import chat
from ..data.encoder import encode
from ..data.rows import RowProblem
from ..errors import UserError
from ..model.loading import context_of, load_model_config
from ..text import printable
from .answer_engines import VLLM_AT_ONCE, Answer, engine_name, make_engine
from .models import dtype_of, fingerprint, model_settings, read_tokenizer
from .questions import Question
from .results import Record, Records
from .settings import AnswerSettings, DecodingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "prompt too long"
SERVER = "server"
"""The engine that is elsewhere, where nobody sees the model's files."""


class Engine(Protocol):
    """Writes an answer to each prompt, with its own seed; see `answer_engines`."""

    def answers(self, prompts: Any, seeds: Sequence[int], /) -> list[Answer]: ...


def answer(
    questions: Sequence[Question], settings: AnswerSettings, model: str, folder: Path
) -> list[Record]:
    """The model's answer to each question, in their order; those in ``folder`` already are kept.

    A record has ``id``, ``output`` (text), ``tokens``, ``finish`` ("stop", "length" or
    "prompt too long") and ``tstamp`` (seconds since 1970, when it was finished). Batches depend on
    the questions and settings alone, and each answer has a seed, so a run that was stopped and
    continued gives the same answers as an uninterrupted one.
    """
    tokenizer = read_tokenizer(settings, model, settings.chat_template)
    engine = engine_name(settings, model)
    asked = [[question.id, question.prompt] for question in questions]
    settled = identity(asked, "questions", settings, model, engine)
    del settled["generator"]

    def record(key: str, made: Answer) -> Record:
        kept = {"id": key, "output": made.output, "tokens": made.tokens, "finish": made.finish}
        return kept | {"tstamp": round(time.time(), 3)}

    with Records(folder, "answers", settled) as records:
        if len(records.done) < len(questions):
            ids = [question.id for question in questions]
            prompts = dict(zip(ids, render(questions, settings, tokenizer), strict=True))
            answerer(settings, model, engine, tokenizer).write([prompts], records, record)
        return [records.done[question.id] for question in questions]


def identity(asked: Any, what: str, settings: DecodingSettings, model: str, engine: str) -> Record:
    """Everything that answers depend on; ``asked`` are the ids and texts of ``what``."""
    texts = json.dumps(asked)
    shown = asdict(settings) | {"model_name_or_path": model, "engine": engine}
    del shown["device"]
    shown |= {what: len(asked), f"{what}_sha256": hashlib.sha256(texts.encode()).hexdigest()}
    if engine == SERVER:
        return shown
    return shown | {"dtype": dtype_of(settings), "model_fingerprint": fingerprint(settings, model)}


def seed_of(seed: int, key: str) -> int:
    """The seed of the answer ``key``, whatever answers are written with it."""
    return int(hashlib.sha256(f"{seed} {key}".encode()).hexdigest()[:8], 16) % 2**31


@dataclass
class Answerer:
    """Answers prompts in batches; a sampled answer's seed comes from ``seed`` and its id.

    Args:
        load: makes the engine, once there is a prompt to answer; see `answer_engines`.
        batch_size: prompts given to it at once.
        seed: of all answers.
        context: the most tokens of prompt and answer; None for no limit known here.
    """

    load: Callable[[], Engine]
    batch_size: int
    seed: int
    context: int | None = None

    def __post_init__(self) -> None:
        self.load = cache(self.load)

    def write(
        self,
        rounds: Sequence[Mapping[str, list[Any]]],
        records: Records,
        record: Callable[[str, Answer], Record],
    ) -> None:
        """Append a record for each prompt of each round, in an order that the prompts decide.

        Args:
            rounds: id -> prompt; every round is batched by itself.
            records: those that it holds already are not written again.
            record: an id and its answer -> what is kept.
        """
        from tqdm.auto import tqdm

        total = sum(map(len, rounds))
        if records.done:
            print(f"{len(records.done):,} of {total:,} answers are in {records.path} already")
        with tqdm(total=total, initial=len(records.done), unit="answer", disable=None) as bar:
            for prompts in rounds:
                keys = list(prompts)
                fits = [self.context is None or len(prompts[key]) < self.context for key in keys]
                left_out = (key for key, fit in zip(keys, fits, strict=True) if not fit)
                records.append(record(key, Answer("", 0, TOO_LONG)) for key in left_out)
                lengths = [len(prompts[key]) * fit for key, fit in zip(keys, fits, strict=True)]
                for places in batches(lengths, self.batch_size):
                    batch = [keys[i] for i in places]
                    if all(key in records.done for key in batch):
                        continue
                    seeds = [seed_of(self.seed, key) for key in batch]
                    made = self.load().answers([prompts[key] for key in batch], seeds)
                    records.append(map(record, batch, made))
                    bar.update(len(records.done) - bar.n)


def answerer(
    settings: DecodingSettings, model: str, engine: str, tokenizer: PreTrainedTokenizerBase
) -> Answerer:
    """An `Answerer` by an engine here, one of those that `engine_name` gives."""
    return Answerer(
        lambda: make_engine(engine, model, settings, tokenizer),
        VLLM_AT_ONCE if engine == "vllm" else settings.batch_size,
        settings.seed,
        context_of(load_model_config(model_settings(settings, model))),
    )


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of the lengths above 0, the longest first, ``size`` at a time."""
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def render(
    questions: Sequence[Question],
    settings: DecodingSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> list[list[int]]:
    """Each question in the chat template, up to where the answer begins, as tokens."""
    opening = opening_of(settings)
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


def opening_of(settings: DecodingSettings) -> list[dict[str, str]]:
    """The system message before each prompt, if the settings have one."""
    system = settings.system_prompt
    return [] if system is None else [{"role": "system", "content": system}]


def length_report(records: Sequence[Record]) -> dict[str, Any]:
    """How long answers are, in characters and the model's tokens; how many did not end."""
    report: dict[str, Any] = {"questions": len(records)}
    for unit, values in (
        ("characters", [len(record["output"]) for record in records]),
        ("tokens", [record["tokens"] for record in records]),
    ):
        if None in values:  # a server that did not count
            continue
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
        stats = report.get(unit)
        if stats is None:
            continue
        lines.append(
            f"  {unit}: mean {stats['mean']:,.0f}, median {stats['median']:,.0f}, "
            f"max {stats['max']:,}"
        )
    for name in ("cut_at_max_new_tokens", "prompt_too_long", "empty"):
        if report[name]:
            lines.append(f"  {name.replace('_', ' ')}: {report[name]:,} of {total:,}")
    return lines
