"""Answers of a model to prompts, several to each: `prompts.jsonl` and `answers.jsonl` of a folder.

An answer's id is PROMPT:K. Its seed comes from the run's seed and that id, and the K-th answers to
all prompts are written before the next, so more answers a prompt change none of those before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.answer_engines import Answer, engine_name
from ..evaluation.answering import (
    SERVER,
    Answerer,
    answerer,
    identity,
    length_lines,
    length_report,
    opening_of,
)
from ..evaluation.chat_client import ChatClient, NothingUsable, in_order, text_of
from ..evaluation.models import read_tokenizer
from ..evaluation.results import Record, Records, output_folder
from ..evaluation.settings import DecodingSettings
from ..files import digest
from .prompts import Prompt, open_prompts, read_prompts


@dataclass
class SampleSettings(DecodingSettings):
    """How `widemargin generate` writes answers."""

    #: Sampling temperature; 0 takes the likeliest token always.
    temperature: float = 0.8
    #: Sample among the likeliest tokens that hold this share of probability, in (0, 1].
    top_p: float = 0.95
    #: Answers written at once by transformers, or asked at once of a server.
    batch_size: int = 16
    #: Address of an OpenAI-compatible server, up to and with /v1, which answers in place of an
    #: engine here; the model is then the server's name for it.
    server_url: str | None = None

    def check_all(self) -> None:
        super().check_all()
        if self.server_url is None:
            return
        for option in ("top_k", "stop_token_ids", "chat_template"):
            if getattr(self, option):
                raise UserError(f"{option}: leave it out; the server at server_url decides that")


def generate(
    source: str,
    model: str,
    out: Path,
    settings: SampleSettings,
    *,
    n: int,
    split: str | None = None,
    limit: int | None = None,
) -> list[Record]:
    """``n`` answers to each of the first ``limit`` prompts of ``source``, those there kept."""
    if n > 1 and not settings.temperature:
        raise UserError("temperature: set it above 0; at 0 all answers to a prompt are the same")
    url = settings.server_url
    tokenizer = None if url else read_tokenizer(settings, model, settings.chat_template)
    rows = open_prompts(source, split)
    prompts, lines = read_prompts(rows, tokenizer, opening_of(settings), limit)
    print("\n".join([f"{len(prompts):,} prompts, {n} answers each", *lines]))
    engine = SERVER if url else engine_name(settings, model)
    settled = identity(
        [[p.content, p.arguments, p.token_ids] for p in prompts], "prompts", settings, model, engine
    )
    if tokenizer is None:
        writer = Answerer(
            lambda: ServerEngine(model, str(url), settings), settings.batch_size, settings.seed
        )
    else:
        settled["tokenizer"] = tokenizer_digest(tokenizer)
        writer = answerer(settings, model, engine, tokenizer)
    folder = output_folder(model, "answers", out)
    with Records(folder, "prompts", settled) as kept:
        kept.append(_prompt_record(prompt) for prompt in prompts)
    with Records(folder, "answers", settled) as records:
        _check_n(n, records)
        writer.write(_rounds(prompts, n), records, _answer_record)
        made = list(records.done.values())
    _report(made, n, folder)
    return made


def tokenizer_digest(tokenizer: Any) -> str:
    """What decides which token an id is."""
    return digest([json.dumps(sorted(tokenizer.get_vocab().items()))])


def _rounds(prompts: Sequence[Prompt], n: int) -> list[dict[str, list[Any]]]:
    """Id -> prompt, of the first answers to all prompts, the second ones, and so on."""
    asked = {p.id: p.content if p.token_ids is None else p.token_ids for p in prompts}
    return [{f"{key}:{k}": prompt for key, prompt in asked.items()} for k in range(n)]


def _prompt_record(prompt: Prompt) -> Record:
    return {
        "id": prompt.id,
        "prompt": prompt.content,
        "arguments": prompt.arguments,
        "token_ids": prompt.token_ids,
        "row": prompt.row,
    }


def _answer_record(key: str, answer: Answer) -> Record:
    prompt_id, _, k = key.rpartition(":")
    return {"id": key, "prompt_id": prompt_id, "k": int(k), **asdict(answer)}


def _check_n(n: int, records: Records) -> None:
    most = 1 + max((record["k"] for record in records.done.values()), default=0)
    if n < most:
        raise UserError(f"--n: give {most} or more; {records.path} has answers of --n {most}")


def _report(records: Sequence[Record], n: int, folder: Path) -> None:
    texts: dict[str, set[str]] = {}
    for record in records:
        texts.setdefault(record["prompt_id"], set()).add(record["output"])
    alike = sum(len(distinct) == 1 for distinct in texts.values())
    print("\n".join(length_lines(length_report(records))))
    if n > 1 and alike:
        print(f"  prompts whose answers are all the same: {alike:,} of {len(texts):,}")
    print(f"Written: {folder / 'answers.jsonl'}; next: widemargin score {folder} --by ...")


class ServerEngine:
    """An OpenAI-compatible server, asked for each answer by itself."""

    def __init__(self, model: str, url: str, settings: DecodingSettings) -> None:
        self.settings = settings
        self.client = ChatClient(model, url, role="server")

    def answers(self, prompts: list[list[Any]], seeds: Sequence[int]) -> list[Answer]:
        return list(in_order(self._answer, list(zip(prompts, seeds, strict=True)), len(prompts)))

    def _answer(self, asked: tuple[list[Any], int]) -> Answer:
        settings, (messages, seed) = self.settings, asked
        body = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": seed}
        try:
            return self.client.ask(
                messages, _served, body | {"max_tokens": settings.max_new_tokens}
            )
        except NothingUsable:
            return Answer("", None, "no answer")


def _served(completion: Any) -> Answer:
    usage = completion.get("usage") or {}
    finish = completion["choices"][0].get("finish_reason") or "stop"
    return Answer(text_of(completion), usage.get("completion_tokens"), str(finish))
