"""What `PreferenceTrainer` makes of arguments and data that do not fit."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, DatasetDict
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.errors import UserError

from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs, tiny_trainer

TOKENS = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
BAD_TOKENS = [
    pytest.param({"chosen_ids": [10**6]}, "chosen_ids has token ids from 3 to 1000000", id="large"),
    pytest.param({"prompt_ids": [1, -2]}, "prompt_ids has token ids from -2", id="negative"),
    pytest.param({"rejected_ids": []}, "rejected_ids of row 1 is empty, 1 in all", id="empty"),
    pytest.param({"prompt_ids": []}, "prompt_ids of row 1 is empty", id="no prompt"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TOKENS)
def test_token_ids_of_the_users_own_are_checked(tmp_path, change, message):
    rows = Dataset.from_list([TOKENS, TOKENS | change])
    with pytest.raises(UserError, match=f"train_dataset: {message}"):
        PreferenceTrainer(
            tiny_model(), tiny_config(tmp_path), train_dataset=rows, processing_class=TOKENIZER
        )


def test_rows_left_out_are_not_checked(tmp_path):
    rows = Dataset.from_list([TOKENS, TOKENS | {"chosen_ids": [10**6]}, TOKENS]).select([0, 2])
    PreferenceTrainer(
        tiny_model(), tiny_config(tmp_path), train_dataset=rows, processing_class=TOKENIZER
    )


WRONG_KINDS = [
    pytest.param({"args": {"objective": "simpo"}}, "args: expected a PreferenceConfig", id="args"),
    pytest.param({"model": None}, "model: expected a causal language model", id="model"),
    pytest.param({"processing_class": "gpt2"}, "processing_class: .*tokenizer", id="tokenizer"),
    pytest.param({"train_dataset": DatasetDict()}, "give one of its splits", id="splits"),
    pytest.param({"train_dataset": [TOKENS]}, "got list; .*from_list", id="list"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_KINDS)
def test_arguments_of_another_kind(tmp_path, change, message):
    given = {"model": tiny_model(), "args": tiny_config(tmp_path), "train_dataset": tiny_pairs()}
    with pytest.raises(UserError, match=message):
        PreferenceTrainer(**{**given, "processing_class": TOKENIZER, **change})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": "1e-6"}, "learning_rate: expected a number"),
        ({"num_train_epochs": "3"}, "num_train_epochs: expected a number, got '3'"),
        ({"logging_steps": "0.5"}, "logging_steps: expected a number, got '0.5'"),
        ({"max_steps": 1.5}, "max_steps: expected a whole number of steps from 1 on"),
    ],
)
def test_numbers_as_text_are_refused(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, **given)


def test_predict_takes_raw_pairs(tmp_path):
    trainer = tiny_trainer(tmp_path)
    pairs = tiny_pairs(5, seed=3)
    found = trainer.predict(pairs).metrics["test_loss"]
    assert found == pytest.approx(trainer.evaluate(pairs)["eval_loss"])


@pytest.mark.costly
def test_several_evaluation_sets(tmp_path):
    """Each as if it were alone, by name, also while training and with a reference."""
    sets = {"near": tiny_pairs(4, seed=1), "far": tiny_pairs(7, seed=7)}
    settings = {"objective": "dpo", "precompute_ref_log_probs": True, "max_steps": 1}
    args = tiny_config(
        tmp_path, **settings, eval_strategy="steps", eval_steps=1, metric_for_best_model="far_loss"
    )
    trainer = PreferenceTrainer(
        tiny_model(), args, tiny_pairs(), eval_dataset=sets, processing_class=TOKENIZER
    )
    assert {"eval_dataset['near']", "eval_dataset['far']"} < set(trainer.pipeline.reports)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_near_loss", "eval_far_rewards/accuracies"} < logged
    metrics = trainer.evaluate()
    assert trainer.state.best_metric == metrics["eval_far_loss"]
    assert trainer.evaluate("far")["eval_loss"] == metrics["eval_far_loss"]
    alone = trainer.evaluate(trainer.eval_dataset["near"])
    assert alone["eval_loss"] == metrics["eval_near_loss"] != metrics["eval_far_loss"]


SEVERAL = {"near": tiny_pairs(4)}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
NOT_OF_SEVERAL = [
    pytest.param({"metric_for_best_model": "loss"}, SEVERAL, "one of near_loss", id="metric"),
    pytest.param({"metric_for_best_model": "near_loss"}, tiny_pairs(4), "one of loss", id="single"),
    pytest.param({"metric_for_best_model": "acc"}, tiny_pairs(4), "one of loss", id="unknown"),
    pytest.param({"eval_samples": 2}, SEVERAL, "eval_samples: .*several", id="samples"),
    pytest.param({}, {}, "there is no evaluation data", id="none"),
    pytest.param({}, {"near": [TOKENS]}, r"eval_dataset\['near'\]: .*got list", id="list"),
]


@pytest.mark.parametrize(("settings", "held_out", "message"), NOT_OF_SEVERAL)
def test_what_several_evaluation_sets_cannot_be(tmp_path, settings, held_out, message):
    args = tiny_config(tmp_path, **EVALUATED, **settings)
    with pytest.raises(UserError, match=message):
        PreferenceTrainer(
            tiny_model(), args, tiny_pairs(), eval_dataset=held_out, processing_class=TOKENIZER
        )


class TrainsElsewhere(torch.optim.SGD):
    """Like schedule-free optimizers: the model's weights are others in training."""

    training = True

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False


def test_an_optimizer_with_modes_leaves_the_weights_that_evaluations_see(tmp_path):
    model = tiny_model()
    optimizer = TrainsElsewhere(model.parameters(), lr=0.01)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = PreferenceTrainer(
        model,
        tiny_config(tmp_path),
        tiny_pairs(8),
        processing_class=TOKENIZER,
        optimizers=(optimizer, constant),
    )
    trainer.train()
    assert not optimizer.training
