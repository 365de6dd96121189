"""Training on lists of scored answers: whole prompts, steps counted in them, any ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.batching.planner import Planner
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import build_objective

from tests.support.tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_config,
    tiny_model,
    tiny_pairs,
)
from tests.support.tree_pairs import text_lists
from tests.support.two_ranks import trained_alike


def trainer_of(folder, data: Any = None, **settings: Any) -> PreferenceTrainer:
    settings = {"objective": "infonca", "beta": 0.5, "per_device_train_batch_size": 6} | settings
    return PreferenceTrainer(
        tiny_model(),
        tiny_config(folder, **settings),
        train_dataset=text_lists() if data is None else data,
        eval_dataset=text_lists(5),
        processing_class=TOKENIZER,
    )


@pytest.mark.parametrize("objective", ["plackett-luce", "pro"])
def test_micro_batches_and_layouts_change_nothing(tmp_path, objective):
    """The loss is the mean over the step's prompts, however they lie."""
    weights, logs = [], []
    for size, accumulation, packing in ((6, 1, "padded"), (2, 3, "packed"), (1, 6, "auto")):
        trainer = trainer_of(
            tmp_path, objective=objective, packing=packing, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, per_device_eval_batch_size=2,
        )  # fmt: skip
        trainer.train()
        evaluated = trainer.evaluate()
        weights.append(parameters_of(trainer.model))
        logs.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        logs[-1] += [evaluated["eval_loss"], evaluated["eval_rewards/accuracies"]]
    for other, log in zip(weights[1:], logs[1:], strict=True):
        assert (other - weights[0]).abs().max() < 1e-5
        assert log == pytest.approx(logs[0], rel=1e-4)
    assert (weights[0] - parameters_of(tiny_model())).abs().max() > 1e-2


def test_the_first_loss_is_the_mean_over_prompts(tmp_path):
    """With the policy as its own reference, of n answers sum log j: over prompts, not pairs."""
    trainer = trainer_of(tmp_path, objective="infonca", max_steps=1)
    trainer.train()
    sizes = [len(row["completions"]) for row in text_lists()]
    first = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
    assert first == pytest.approx(np.mean(np.log(sizes)), rel=1e-5)
    assert len(trainer.train_dataset) > len(sizes)  # pyright: ignore


def plan_rows(folder) -> PairRows:
    return trainer_of(folder).train_dataset  # pyright: ignore


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_tree_is_ever_cut(tmp_path, ranks, micro_batches):
    from widemargin.trainer.data.table import TreeLengths

    lengths = plan_rows(tmp_path).lengths
    for coupled in (False, True):
        planner = Planner(TreeLengths(lengths), 4, micro_batches, ranks, coupled=coupled)
        for epoch in range(3):
            plan = planner.plan(epoch)
            assert sorted(plan.order.tolist()) == list(range(len(lengths)))
            trees, parts = plan.trees
            assert trees == parts == 6
            first = plan.order[: plan.bounds[plan.steps[1] * ranks]]
            assert len(set(lengths.tree[first].tolist())) == 4


def test_a_tree_over_the_limit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"prompt \d of train_dataset takes \d+ tokens by itself"):
        trainer_of(tmp_path, max_tokens_per_micro_batch=30)
    trainer = trainer_of(tmp_path, max_tokens_per_micro_batch=80)
    plan = trainer.pipeline.training_batches(trainer.train_dataset).plan  # pyright: ignore
    assert plan.trees == (6, 6)
    assert plan.tokens(trainer.pipeline.layout).max() <= 80
    assert trainer.args.gradient_accumulation_steps > 1


def test_the_plan_counts_prompts(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=3)
    lines = trainer.pipeline.summary(trainer.train_dataset).lines()  # pyright: ignore
    assert "3 prompts a step, 2 steps an epoch" in lines[0]
    assert "6 trees" in lines[2]


def test_pairs_with_scores_are_lists_of_their_prompts(tmp_path):
    """The pairs of several rows with one prompt are one list; an answer's score its leaf's."""
    rows = [
        {"prompt": "User: yes Assistant:", "chosen": " Paris.", "rejected": f" {word}",
         "score_chosen": 3.0, "score_rejected": score}
        for word, score in (("no", 1.0), ("never", 0.5), ("water", 0.5))
    ]  # fmt: skip
    trainer = trainer_of(tmp_path, Dataset.from_list(rows), max_steps=1)
    (batch,) = trainer.get_train_dataloader()
    assert batch["tree_ids"].tolist() == [0] * 4
    assert sorted(batch["scores"].tolist()) == [0.5, 0.5, 1.0, 3.0]
    assert batch["scores"][batch["edges"][:, 0]].tolist() == [3.0] * 3
    trainer.train()


def test_answers_of_equal_tokens_and_different_scores_stay_apart(tmp_path):
    row = text_lists(3).to_list()[2]
    row["completions"] = [*row["completions"], row["completions"][0]]
    row["scores"] = [*row["scores"], 0.25]
    trainer = trainer_of(tmp_path, Dataset.from_list([row]))
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["scores"]) == 5
    assert trainer.pipeline.reports["train_dataset"].skipped == {"identical sides": 1}


def test_answers_that_tie_with_the_best_are_in_the_list(tmp_path):
    row = {"prompt": "User: yes Assistant:", "completions": [" yes", " no", " Paris"]}
    trainer = trainer_of(tmp_path, Dataset.from_list([row | {"ranks": [1, 1, 2]}]))
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch["scores"].tolist()) == [-2.0, -1.0, -1.0]


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    settings: dict[str, Any] = {
        "objective": "lipo", "per_device_train_batch_size": 2, "max_steps": 6,
        "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3,
    }  # fmt: skip
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    again = trainer_of(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(parameters_of(whole.model), parameters_of(again.model))


def test_the_reference_is_cached_by_answer(tmp_path, own_cache):
    now, before = (
        trainer_of(tmp_path, max_steps=2, precompute_ref_log_probs=cached)
        for cached in (False, True)
    )
    for each in (now, before):
        each.train()
    assert (parameters_of(now.model) - parameters_of(before.model)).abs().max() < 1e-6


def test_data_without_scores_are_refused(tmp_path):
    with pytest.raises(UserError, match="give rows with score_chosen and score_rejected"):
        trainer_of(tmp_path, tiny_pairs(4))
    rows = trainer_of(tmp_path, objective="simpo").train_dataset
    with pytest.raises(UserError, match="train_dataset: name the objective in the settings"):
        PreferenceTrainer(
            tiny_model(),
            tiny_config(tmp_path, objective="simpo"),
            train_dataset=rows,
            processing_class=TOKENIZER,
            objective=build_objective("pro"),
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("edges", "best-vs-rest"),
        ("group_by_prompt", False),
        ("pair_weighting", "prompt"),
        ("margin_from", "scores"),
        ("flip", 0.1),
    ],
)
def test_settings_that_make_pairs_are_refused(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name}: leave it out; a listwise objective ranks all"):
        tiny_config(tmp_path, objective="rrhf", **{name: value})
    assert tiny_config(tmp_path, objective="simpo", **{name: value}).takes == ("pairs",)


@pytest.mark.costly
def test_two_ranks_equal_one(tmp_path, monkeypatch):
    settings = "objective: infonca, max_steps: 4, learning_rate: 0.05"
    trained_alike(tmp_path, monkeypatch, text_lists(7), settings)
