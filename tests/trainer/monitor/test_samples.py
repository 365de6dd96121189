"""Answers at evaluations: the same prompts, what is written, and that training does not notice."""

from __future__ import annotations

import json
import logging
import random
import re
from typing import Any

import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.generation import stop_ids
from widemargin.trainer.monitor import samples
from widemargin.trainer.report.write import write_report

from tests.support.tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_config,
    tiny_model,
    tiny_trainer,
)

EVALUATIONS = {
    "eval_pairs": 7,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "max_steps": 4,
    "pairs": 12,
}


def read(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.costly
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_training_is_the_same_to_the_bit_with_and_without(tmp_path, temperature):
    """With dropout, whose draws would differ if answers had moved the random numbers."""
    common = {**EVALUATIONS, "objective": "lmpo", "disable_dropout": False}
    ends, drawn = [], []
    for wanted in (0, 3):
        model = tiny_model(attention_dropout=0.2)
        sampled = {"eval_samples": wanted, "eval_samples_temperature": temperature}
        common |= {"eval_samples_max_new_tokens": 6, **sampled}
        trainer = tiny_trainer(tmp_path / str(wanted), model=model, **common)
        trainer.train()
        ends.append(parameters_of(trainer.model))
        drawn.append((torch.rand(3).tolist(), random.random()))
    assert torch.equal(*ends)
    assert drawn[0] == drawn[1]
    assert not (tmp_path / "0" / "samples.jsonl").exists()
    rows = read(tmp_path / "3")
    places = [(step, i) for step in (0, 2, 4) for i in range(3)]
    assert [(row["step"], row["index"]) for row in rows] == places
    assert len({row["prompt"] for row in rows}) == 3
    assert all(0 <= row["tokens"] <= 6 for row in rows)


def test_lengths_and_repetition_are_logged(tmp_path):
    trainer = tiny_trainer(tmp_path, **EVALUATIONS, eval_samples=3, eval_samples_max_new_tokens=9)
    trainer.train()
    rows = read(tmp_path)
    logged = [entry for entry in trainer.state.log_history if "samples/tokens" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    for entry in logged:
        now = [row for row in rows if row["step"] == entry["step"]]
        assert entry["samples/tokens"] == sum(row["tokens"] for row in now) / 3
        assert entry["samples/repetition"] == sum(row["repetition"] for row in now) / 3


def test_rows_have_the_margins_of_their_pairs(tmp_path):
    """Against the rewards that ``compute_metrics`` gets, at two evaluations in small batches."""
    rewards = []

    def keep(prediction):
        rewards.append(prediction.predictions[:, 0] - prediction.predictions[:, 1])
        return {}

    settings = EVALUATIONS | {"eval_on_start": False, "per_device_eval_batch_size": 2}
    trainer = tiny_trainer(tmp_path, **settings, eval_samples=3, eval_samples_max_new_tokens=2)
    trainer.reward_metrics.compute_metrics = keep
    trainer.train()
    margins = [row["margin"] for row in read(tmp_path)]
    assert margins == [*rewards[0][:3], *rewards[1][:3]]
    assert len(set(margins)) == 6


def test_greedy_answers_are_the_likeliest_tokens(tmp_path):
    """Against a loop without padding, cache or `generate`."""
    trainer = tiny_trainer(tmp_path, **EVALUATIONS, eval_samples=4, eval_samples_max_new_tokens=5)
    rows = samples.SampleWriter(trainer).answers(0)
    model: Any = tiny_model().eval()
    stops = stop_ids(TOKENIZER, model.generation_config)
    for i, row in enumerate(rows):
        ids = [int(t) for t in trainer.eval_dataset[i]["prompt_ids"]]
        answer = []
        for _ in range(5):
            token = int(model(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if token in stops:
                break
            answer.append(token)
        assert row["answer"] == TOKENIZER.decode(answer, skip_special_tokens=True)
        assert row["tokens"] == len(answer)
        assert row["finished"] == (len(answer) < 5)


def test_drawn_answers_repeat_by_seed(tmp_path):
    sampled = {"eval_samples_max_new_tokens": 8, "eval_samples_temperature": 1.5}
    trainer = tiny_trainer(tmp_path, eval_samples=3, **sampled, **EVALUATIONS)
    writer = samples.SampleWriter(trainer)
    first = writer.answers(0)
    torch.manual_seed(99)
    assert writer.answers(0) == first
    trainer.args.seed += 1
    assert writer.answers(0) != first


def test_the_model_is_left_as_it_was(tmp_path):
    trainer = tiny_trainer(tmp_path, **EVALUATIONS, eval_samples=1, eval_samples_max_new_tokens=2)
    own = trainer.model.generation_config
    trainer.model.train()
    samples.SampleWriter(trainer).answers(0)
    assert trainer.model.training
    assert trainer.model.generation_config is own


def test_sampling_leaves_nothing_on_the_model_inside_an_adapter(tmp_path):
    sampled = {"eval_samples_max_new_tokens": 2, "eval_samples_temperature": 1.0}
    trainer = tiny_trainer(tmp_path, use_peft=True, eval_samples=1, **sampled, **EVALUATIONS)
    own = trainer.model.get_base_model().generation_config
    samples.SampleWriter(trainer).answers(0)
    assert trainer.model.get_base_model().generation_config is own


def test_a_prompt_that_fills_the_context_gets_no_answer(tmp_path):
    trainer = tiny_trainer(tmp_path, **EVALUATIONS, eval_samples=2)
    config: Any = trainer.model.config
    config.max_position_embeddings = 3
    assert [(r["answer"], r["finished"]) for r in samples.SampleWriter(trainer).answers(0)] == [
        ("", False)
    ] * 2


def test_more_samples_than_pairs_and_no_training_writes_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, **EVALUATIONS, eval_samples=50, eval_samples_max_new_tokens=2)
    assert len(samples.SampleWriter(trainer).answers(0)) == 7
    trainer.evaluate()
    assert not (tmp_path / "samples.jsonl").exists()


def test_weights_in_pieces_are_left_alone_with_one_remark(tmp_path, monkeypatch, caplog):
    trainer = tiny_trainer(tmp_path, **EVALUATIONS, eval_samples=1)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with caplog.at_level(logging.WARNING):
        writer = samples.SampleWriter(trainer)
    remarks = [
        r.getMessage() for r in caplog.records if r.name == "widemargin.trainer.monitor.samples"
    ]
    assert [remark.count("ZeRO-3") for remark in remarks] == [1]
    monkeypatch.setattr(trainer, "is_in_train", True)
    writer.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("eval_samples", -1),
        ("eval_samples", True),
        ("eval_samples", 2.5),
        ("eval_samples_max_new_tokens", 0),
        ("eval_samples_temperature", -1.0),
        ("eval_samples_temperature", "hot"),
        ("eval_samples", 3),
    ],
)
def test_settings_that_cannot_be(tmp_path, setting, value):
    """The last is a fair number, but nothing would evaluate."""
    with pytest.raises(UserError, match=setting):
        tiny_config(tmp_path, **{setting: value})


def test_the_report_shows_them_over_the_steps(tmp_path):
    trainer = tiny_trainer(tmp_path, **EVALUATIONS, eval_samples=2, eval_samples_max_new_tokens=3)
    trainer.train()
    trainer.save_state()
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count('class="card strip"') == 2
    assert page.count("<h4>step 4<") == 2
    assert len(re.findall(r" · 3 tokens, cut · margin [+-]\d\.\d\d<", page)) > 2
