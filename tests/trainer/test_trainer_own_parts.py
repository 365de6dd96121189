"""A user's own subclass, optimizer, collator and data sets inside the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from widemargin.kernels.margin_loss import margin_loss
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.errors import UserError
from widemargin.trainer.packing import PairCollator, model_inputs

from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs


class Plain(PreferenceTrainer):
    """Computes SimPO's loss by itself."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        scored = model(**model_inputs(inputs))
        margins = torch.ones(len(inputs["pair_ids"]))
        losses = margin_loss(scored.token_logps, inputs["cu_seqlens"], margins, beta=2.0)
        if num_items_in_batch is None:
            return losses.mean()
        return losses.sum() / num_items_in_batch


class WithPenalty(PreferenceTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss + 10, outputs) if return_outputs else loss + 10


class Uncounted(PreferenceTrainer):
    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(*args, **kwargs)[0], None


class Spoilt(Plain):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * torch.nan


def made(folder, kind=PreferenceTrainer, parts=None, **settings) -> PreferenceTrainer:
    return kind(
        tiny_model(),
        tiny_config(folder, **settings),
        train_dataset=tiny_pairs(12),
        eval_dataset=tiny_pairs(7, seed=1),
        processing_class=TOKENIZER,
        **parts or {},
    )


def test_eval_loss_is_the_subclass_s_own(tmp_path):
    """Whether it changes the objective's loss, or computes one without it."""
    expected = made(tmp_path).evaluate()
    plain = made(tmp_path, Plain, per_device_eval_batch_size=3).evaluate()
    assert plain["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    penalised = made(tmp_path, WithPenalty, per_device_eval_batch_size=3).evaluate()
    assert penalised["eval_loss"] == pytest.approx(expected["eval_loss"] + 10, rel=1e-5)
    assert penalised["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"])


def test_without_a_number_of_pairs_micro_batches_weigh_alike(tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    curves = []
    for kind in (PreferenceTrainer, Plain, Uncounted):
        trainer = made(tmp_path, kind, **settings)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_a_loss_without_pairs_that_is_not_finite_names_none(tmp_path):
    with pytest.raises(UserError, match="Step 1: the gradient's norm is not finite; nothing"):
        made(tmp_path, Spoilt).train()


@pytest.mark.parametrize("settings", [{}, {"use_peft": True, "lora_r": 2}], ids=["other", "lora"])
def test_an_optimizer_of_nothing_that_learns_is_refused(tmp_path, settings):
    """One made before the adapter was, or of another model, would train nothing."""
    model = tiny_model()
    other = model if settings else tiny_model()
    with pytest.raises(UserError, match=r"optimizers: .* holds no parameter of this model"):
        PreferenceTrainer(
            model,
            tiny_config(tmp_path, **settings),
            train_dataset=tiny_pairs(4),
            processing_class=TOKENIZER,
            optimizers=(torch.optim.SGD(other.parameters(), lr=0.1), None),
        )


def test_a_collator_without_what_the_trainer_reads_is_refused(tmp_path):
    ours = PairCollator(TOKENIZER.pad_token_id)

    def collate(rows: Any) -> dict[str, Any]:
        return {name: value for name, value in ours(rows).items() if name != "pair_ids"}

    with pytest.raises(UserError, match=r"data_collator: .* PairCollator .* it has no pair_ids"):
        made(tmp_path, parts={"data_collator": collate})


def test_a_data_set_assigned_later(tmp_path):
    trainer = made(tmp_path)
    expected = trainer.evaluate(tiny_pairs(5, seed=3))["eval_loss"]
    trainer.eval_dataset = tiny_pairs(5, seed=3)
    assert trainer.evaluate()["eval_loss"] == expected
    trainer.eval_dataset = {"other": tiny_pairs(5, seed=3)}
    assert trainer.evaluate()["eval_other_loss"] == expected
    with pytest.raises(UserError, match="eval_dataset"):
        trainer.get_eval_dataloader("no such set")
    trainer.train_dataset = tiny_pairs(5)
    with pytest.raises(UserError, match="train_dataset: make a PreferenceTrainer with it"):
        trainer.train()


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (lambda model: torch.compile(model, backend="eager"), "set torch_compile: true"),
        (torch.nn.Sequential, "model: give it without the Sequential around it"),
    ],
)
def test_a_model_inside_another_is_refused(tmp_path, inside, message):
    with pytest.raises(UserError, match=message):
        PreferenceTrainer(inside(tiny_model()), tiny_config(tmp_path))
