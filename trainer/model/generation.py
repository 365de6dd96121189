"""Answers from a model: the tokens that end one, its longest length, and a batch of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..data import chat
from ..data.turns import end_of_turn_id


@dataclass
class Decoding:
    """How answers are written; at temperature 0 each token is the likeliest."""

    stops: list[int]
    """Tokens that end an answer."""
    pad_id: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0 for all tokens."""


@dataclass
class Completion:
    """One answer's tokens, and the token that ended it; None where it was cut."""

    token_ids: list[int]
    end: int | None

    @property
    def stopped(self) -> bool:
        return self.end is not None


class _RowNoise(LogitsProcessor):
    """Gumbel noise on scores, whose largest entry is then a sample; each row has its own seed."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, saved: Any, stop_token_ids: list[int] | None = None
) -> list[int]:
    """The tokens that end an answer: ``stop_token_ids`` if given.

    Otherwise those of ``saved``, the model's own generation config, the tokenizer's end of sequence
    and the token with which the chat template closes an answer.
    """
    if stop_token_ids is not None:
        return sorted(set(stop_token_ids))
    eos = getattr(saved, "eos_token_id", None)
    ids = eos if isinstance(eos, list) else [eos]
    ids = [*ids, chat.only_id(tokenizer.eos_token_id), end_of_turn_id(tokenizer)]
    return sorted({i for i in ids if i is not None})


def context_of(config: Any) -> int | None:
    """The most tokens the model takes, prompt and answer together; None where it does not say."""
    text = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")
    return next((limit for name in names if (limit := getattr(text, name, None))), None)


def complete(
    model: Any, prompts: list[list[int]], decoding: Decoding, seeds: Sequence[int]
) -> list[Completion]:
    """Continue each prompt by `generate` with its own seed, the shorter ones padded on the left.

    Answers end within the model's context; a batch that fills it gets empty ones. The model's own
    generation config counts for nothing, and stays as it was, like its mode and the random numbers.
    """
    width = max(map(len, prompts))
    context = context_of(model.config)
    most = decoding.max_new_tokens if context is None else context - width
    if most < 1:
        return [Completion([], None) for _ in prompts]
    ids = torch.full((len(prompts), width), decoding.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = model.device
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(most, decoding.max_new_tokens),
        eos_token_id=decoding.stops or None,
        pad_token_id=decoding.pad_id,
    )
    with _generating(model, config), torch.no_grad():
        written = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=_sampling(decoding, seeds, device),
        )
    return [_cut(row, decoding.stops) for row in written[:, width:].tolist()]


def _sampling(
    decoding: Decoding, seeds: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """What makes the likeliest token a sample; nothing at temperature 0."""
    processors = LogitsProcessorList()
    if decoding.temperature > 0:
        processors.append(TemperatureLogitsWarper(decoding.temperature))
        if decoding.top_k:
            processors.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            processors.append(TopPLogitsWarper(decoding.top_p))
        processors.append(_RowNoise(seeds, device))
    return processors


@contextmanager
def _generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode with ``config`` as the model's, from which `generate` takes its defaults."""
    training, saved = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = saved
        model.train(training)


def _cut(ids: list[int], stops: list[int]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Completion(ids[:end], None if end is None else ids[end])
