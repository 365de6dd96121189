"""Answers from a model: the tokens that end one, its longest length, and a batch of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

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
    """One answer's tokens, without the one that ended it, and whether one did."""

    token_ids: list[int]
    stopped: bool


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
    model: Any, prompts: list[list[int]], decoding: Decoding, seed: int
) -> list[Completion]:
    """Continue each prompt by `generate`, the shorter ones padded on the left.

    Answers end within the model's context; a batch that fills it gets empty ones. The model's own
    generation config counts for nothing, and stays as it was, like its mode and the random numbers.
    """
    width = max(map(len, prompts))
    context = context_of(model.config)
    most = decoding.max_new_tokens if context is None else context - width
    if most < 1:
        return [Completion([], False) for _ in prompts]
    ids = torch.full((len(prompts), width), decoding.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    device = model.device
    config = _generation_config(decoding, min(most, decoding.max_new_tokens))
    with _generating(model, config), torch.no_grad():
        torch.manual_seed(seed)
        written = model.generate(ids.to(device), attention_mask=mask.to(device))
    return [_cut(row, decoding.stops) for row in written[:, width:].tolist()]


def _generation_config(decoding: Decoding, max_new_tokens: int) -> GenerationConfig:
    sampling = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "top_k": decoding.top_k,
    }
    return GenerationConfig(
        do_sample=decoding.temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=decoding.stops or None,
        pad_token_id=decoding.pad_id,
        **(sampling if decoding.temperature > 0 else {}),
    )


@contextmanager
def _generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode with ``config`` as the model's, from which `generate` takes its defaults."""
    training, saved = model.training, model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        model.generation_config = config
        try:
            yield
        finally:
            model.generation_config = saved
            model.train(training)


def _cut(ids: list[int], stops: list[int]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    return Completion(ids[:end], end is not None)
