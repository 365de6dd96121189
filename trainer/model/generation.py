"""Answers from a model: the tokens that end one, and a batch of them."""

from __future__ import annotations

import math
import random
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
    TopKLogitsWarper,
)

from ..data import chat
from ..data.turns import end_of_turn_id
from .loading import context_of


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


class _Sampler(LogitsProcessor):
    """Leaves of each row's scores one token, drawn by the row's own seed.

    A token outside of the likeliest that hold ``top_p`` is drawn again, which takes no sorting.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int]) -> None:
        self.temperature, self.top_p = decoding.temperature, decoding.top_p
        self.cut = TopKLogitsWarper(decoding.top_k) if decoding.top_k else None
        self.draws = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        kept: Any = scores if self.cut is None else self.cut(input_ids, scores)  # pyright: ignore
        probabilities = (kept / self.temperature).softmax(-1)
        sums = probabilities.cumsum(-1)
        drawn = torch.full((len(scores), 1), -1, device=scores.device)
        rows = list(range(len(scores)))
        while rows:
            points = sums.new_tensor([[self.draws[row].random()] for row in rows])
            tokens = torch.searchsorted(sums[rows], points * sums[rows, -1:], right=True)
            tokens = tokens.clamp(max=scores.shape[-1] - 1)
            likely = probabilities[rows]
            own = likely.gather(1, tokens)
            above = torch.where(likely > own, likely, 0).sum(-1, keepdim=True)
            right = ((own > 0) & ((above < self.top_p) | (self.top_p == 1))).flatten()
            drawn[rows] = torch.where(right[:, None], tokens, -1)
            rows = [row for row, done in zip(rows, right.tolist(), strict=True) if not done]
        return torch.full_like(scores, -math.inf).scatter(1, drawn, 0.0)


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
    sampling = [_Sampler(decoding, seeds)] if decoding.temperature else []
    with _generating(model, config), torch.no_grad():
        written = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=LogitsProcessorList(sampling),
        )
    return [_cut(row, decoding.stops) for row in written[:, width:].tolist()]


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
