"""A server that writes answers, by the protocol of OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evaluation.answer_engines import Answer
from ..evaluation.chat_client import ChatClient, NothingUsable, in_order, text_of
from ..evaluation.settings import DecodingSettings


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
