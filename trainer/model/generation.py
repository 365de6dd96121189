"""Answers from a model: the tokens that end one, and a batch of them."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, threshold
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
)

from ..data import chat
from ..data.turns import end_of_turn_id
from ..errors import UserError
from .cache import part_of
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


PIECE = 32
"""Tokens that `complete` writes between looks at which answers have ended."""


class _Sampler(LogitsProcessor):
    """Leaves of each row's scores one token, by the next of the row's own random numbers.

    A token outside of the likeliest that hold ``top_p`` is drawn again, which takes no sorting.
    """

    def __init__(self, decoding: Decoding, draws: Sequence[random.Random]) -> None:
        self.temperature, self.top_p = decoding.temperature, decoding.top_p
        self.cut = TopKLogitsWarper(decoding.top_k) if decoding.top_k else None
        self.draws = draws

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        """Written over ``scores``, which `generate` has copied for it."""
        kept: Any = scores if self.cut is None else self.cut(input_ids, scores)  # pyright: ignore
        shares = kept.sub_(kept.amax(-1, keepdim=True)).div_(self.temperature).exp_()
        sums = shares.cumsum(-1)
        totals = sums[:, -1:]
        if not totals.isfinite().all():
            raise UserError("model: take a checkpoint that works; its scores are not all numbers")
        points, tokens = torch.zeros_like(totals), totals.long()
        rows = list(range(len(scores)))
        while rows:
            points[rows] = sums.new_tensor([[self.draws[row].random()] for row in rows])
            tokens = torch.searchsorted(sums, points * totals, right=True)
            tokens = tokens.clamp(max=scores.shape[-1] - 1)
            own = shares.gather(1, tokens)
            pairs = torch.cat([own, totals], 1).tolist()
            rows = [row for row in rows if not self._likely(shares[row], *pairs[row])]
        return scores.fill_(-math.inf).scatter_(1, tokens, 0.0)

    def _likely(self, shares: torch.Tensor, share: float, total: float) -> bool:
        """Whether a token is among the likeliest that hold ``top_p`` of the total."""
        if share > (1 - self.top_p) * total:  # what all others hold is less
            return True
        return share > 0 and bool(threshold(shares, share, 0.0).sum() < self.top_p * total)


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

    It writes in pieces, after which the answers that have ended leave the batch. Answers end within
    the model's context; a batch that fills it gets empty ones. The model's own generation config
    counts for nothing, and stays as it was, like its mode and the random numbers.
    """
    width, context = max(map(len, prompts)), context_of(model.config)
    end = min(width + decoding.max_new_tokens, context or sys.maxsize)
    ids = torch.full((len(prompts), width), decoding.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    config = GenerationConfig(
        do_sample=False,
        eos_token_id=decoding.stops or None,
        pad_token_id=decoding.pad_id,
        return_dict_in_generate=True,
    )
    answers = [Completion([], None) for _ in prompts]
    draws = [random.Random(seed) for seed in seeds]
    rows, size, kept = list(range(len(prompts))), PIECE, {}
    with _generating(model, config), torch.no_grad():
        while ids.shape[1] < end:
            sampler = _Sampler(decoding, [draws[row] for row in rows])
            written = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=min(size, end - ids.shape[1]),
                logits_processor=LogitsProcessorList([sampler] if decoding.temperature else []),
                **kept,
            )
            for row, tokens in zip(rows, written.sequences[:, width:].tolist(), strict=True):
                answers[row] = _cut(tokens, decoding.stops)
            left = [place for place, row in enumerate(rows) if not answers[row].stopped]
            if not left:
                break
            cache = part_of(written.past_key_values, left, len(rows))
            rows = [rows[place] for place in left]
            ids = written.sequences[left]
            mask = pad(mask[left], (0, ids.shape[1] - mask.shape[1]), value=1)
            size, kept = (end, {}) if cache is None else (PIECE, {"past_key_values": cache})
    return answers


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
