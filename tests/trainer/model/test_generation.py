"""Batches of answers: what ends one, padding that changes nothing, and a model left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from widemargin.trainer.errors import UserError
from widemargin.trainer.model import cache, generation
from widemargin.trainer.model.generation import Completion, Decoding, complete, stop_ids

from tests.support import tiny_models
from tests.support.packed_rows import RECURRENT, family_model
from tests.support.tiny_models import tiny_model

TOKENIZER: Any = tiny_models.TOKENIZER
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
PAD = TOKENIZER.pad_token_id
ENDS = {TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|end|>")}


@pytest.mark.parametrize("eos", [None, 7, [7, 8]])
def test_stops_of_the_model_the_tokenizer_and_the_template(eos):
    saved = GenerationConfig(eos_token_id=eos)
    of_model = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    assert stop_ids(TOKENIZER, saved) == sorted(ENDS | of_model)
    assert stop_ids(TOKENIZER, None) == sorted(ENDS)
    assert stop_ids(TOKENIZER, saved, [9, 3, 9]) == [3, 9]


def test_a_batch_answers_as_each_prompt_alone_and_ends_before_the_stop():
    model: Any = tiny_model().eval()
    unending = complete(model, PROMPTS, Decoding([], PAD, 8), seeds=[0] * 3)
    assert [len(answer.token_ids) for answer in unending] == [8, 8, 8]
    assert not any(answer.stopped for answer in unending)
    stop = unending[0].token_ids[3]
    decoding = Decoding([stop], PAD, 8)
    answers = complete(model, PROMPTS, decoding, seeds=[0] * 3)
    end = unending[0].token_ids.index(stop)
    assert answers[0] == Completion(unending[0].token_ids[:end], stop)
    assert answers == [complete(model, [prompt], decoding, seeds=[0])[0] for prompt in PROMPTS]


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    model: Any = tiny_model().train()
    saved = model.generation_config
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    decoding = Decoding([], PAD, 6, temperature=1.5)
    drawn = complete(model, PROMPTS, decoding, [1, 2, 3])
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    assert model.generation_config is saved
    assert complete(model, PROMPTS, decoding, [1, 2, 3]) == drawn
    assert complete(model, PROMPTS, decoding, [4, 5, 6]) != drawn


def test_a_sample_is_that_of_its_seed_whatever_its_batch():
    model: Any = tiny_model().eval()
    decoding = Decoding([], PAD, 6, temperature=1.5, top_p=0.9, top_k=20)
    drawn = complete(model, PROMPTS, decoding, [1, 2, 3])
    for seed, prompt, answer in zip((1, 2, 3), PROMPTS, drawn, strict=True):
        assert complete(model, [prompt], decoding, [seed]) == [answer]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (9, 0.7)])
def test_samples_come_as_often_as_they_are_likely(top_k, top_p):
    """First tokens of many seeds against the cut softmax, within four deviations."""
    model: Any = tiny_model().eval()
    count = 2000
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[2]])).logits[0, -1] / 0.7
    likeliest = logits.topk(top_k or len(logits))
    shares = likeliest.values.softmax(0)
    kept = shares.cumsum(0) - shares < top_p
    tokens, shares = likeliest.indices[kept], shares[kept] / shares[kept].sum()
    assert 2 < len(tokens) < len(logits) / 2
    decoding = Decoding([], PAD, 1, 0.7, top_p, top_k)
    answers = complete(model, [PROMPTS[2]] * count, decoding, range(count))
    drawn = torch.tensor([answer.token_ids[0] for answer in answers])
    assert set(drawn.tolist()) <= set(tokens.tolist())
    for token, share in zip(tokens, shares, strict=True):
        deviation = (share * (1 - share) / count).sqrt()
        assert abs((drawn == token).float().mean() - share) < 4 * deviation


def test_answers_end_within_the_context():
    model = tiny_model(max_position_embeddings=8)
    answers = complete(model, PROMPTS, Decoding([], PAD, 6), seeds=[0] * 3)
    assert [len(answer.token_ids) for answer in answers] == [2, 2, 2]
    full = complete(model, [[5] * 8, [5]], Decoding([], PAD, 6), seeds=[0, 0])
    assert full == [Completion([], None)] * 2


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "qwen3_moe", *RECURRENT])
def test_answers_in_pieces_are_those_in_one(family, monkeypatch):
    """Also where layers have windows or states, or several keys that no piece can go on from."""
    model: Any = family_model(family).eval()
    unending = complete(model, PROMPTS, Decoding([], PAD, 20, 1.5), [1, 2, 3])
    stops = [answer.token_ids[5 * i + 2] for i, answer in enumerate(unending[:2])]
    decoding = Decoding(stops, PAD, 20, 1.5)
    monkeypatch.setattr(generation, "PIECE", 20)
    once = complete(model, PROMPTS, decoding, [1, 2, 3])
    assert len({len(answer.token_ids) for answer in once}) > 1
    monkeypatch.setattr(generation, "PIECE", 3)
    monkeypatch.setattr(cache, "ROOM", 4)
    assert complete(model, PROMPTS, decoding, [1, 2, 3]) == once


def test_answers_that_have_ended_are_computed_no_further(monkeypatch):
    model: Any = tiny_model().eval()
    unending = complete(model, PROMPTS, Decoding([], PAD, 40), [0] * 3)
    stop = unending[1].token_ids[2]
    decoding = Decoding([stop], PAD, 40)
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    monkeypatch.setattr(generation, "PIECE", 4)
    answers = complete(model, PROMPTS, decoding, [0] * 3)
    assert shapes[:4] == [(3, 6), *[(3, 1)] * 3]
    lengths = [len(answer.token_ids) + answer.stopped for answer in answers]
    pieces = [-(-length // 4) * 4 for length in lengths]
    assert sum(rows * tokens for rows, tokens in shapes) == 3 * 6 + sum(pieces) - 3


def test_scores_that_are_no_numbers_are_said():
    model: Any = tiny_model().eval()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(UserError, match="model: take a checkpoint that works"):
        complete(model, PROMPTS, Decoding([], PAD, 6, 1.0), [1, 2, 3])
