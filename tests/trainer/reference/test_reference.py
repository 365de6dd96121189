"""The frozen model: where its log-probs come from, and that they stay."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.data.table import REFERENCE_COLUMNS
from widemargin.trainer.errors import UserError

from tests.support.reference_runs import (
    LORA,
    ONCE,
    dpo_trainer,
    losses,
    sums_by_hand,
    trained,
    with_columns,
)
from tests.support.tiny_models import TOKENIZER, parameters_of, tiny_config, tiny_model, tiny_pairs
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.support.two_ranks import trained_alike

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("settings", [{}, LORA, ONCE, LORA | ONCE], ids=str)
@pytest.mark.parametrize("bf16", [False, True])
def test_the_first_loss_is_ln_2_and_nothing_is_warned_of(tmp_path, caplog, settings, bf16):
    trainer = trained(tmp_path, **settings, bf16=bf16)
    bound = 2e-2 if bf16 and "precompute_ref_log_probs" in settings else 1e-6
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=bound)
    assert abs(losses(trainer)[-1] - math.log(2)) > 1e-3
    assert "its own reference" not in caplog.text


@pytest.mark.parametrize("named", [False, True])
def test_a_step_by_hand_against_another_model(tmp_path, named):
    other = tiny_model(seed=5)
    other.save_pretrained(tmp_path / "other")
    by = {"ref_model_name_or_path": str(tmp_path / "other")} if named else {"ref_model": other}
    trainer = dpo_trainer(tmp_path, max_steps=1, pairs=4, **by)
    model, frozen = tiny_model(), tiny_model(seed=5)
    rewards = []
    for i in range(4):
        row = trainer.train_dataset[i]
        chosen, rejected = sums_by_hand(model, row)
        ref_chosen, ref_rejected = (s.detach() for s in sums_by_hand(frozen, row))
        rewards.append(0.5 * ((chosen - ref_chosen) - (rejected - ref_rejected)))
    loss = torch.nn.functional.softplus(-torch.stack(rewards)).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(parameters_of(trainer.model), parameters_of(model))
    assert torch.equal(parameters_of(trainer.reference.model), parameters_of(frozen))


def test_a_reference_of_the_name_that_an_object_came_from_is_loaded(tmp_path):
    """The object's weights may be others by now."""
    tiny_model(seed=5).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    with torch.no_grad():
        policy.lm_head.weight += 1
    trainer = PreferenceTrainer(
        policy,
        tiny_config(tmp_path, objective="dpo"),
        train_dataset=tiny_pairs(8),
        ref_model=str(tmp_path / "model"),
    )
    saved = parameters_of(tiny_model(seed=5))
    assert torch.equal(parameters_of(trainer.reference.model), saved)
    assert not trainer.reference.starting


def test_the_default_reference_stays_the_starting_policy(tmp_path):
    trainer = trained(tmp_path, eval_pairs=4)
    assert torch.equal(parameters_of(trainer.reference.model), parameters_of(tiny_model()))
    assert not any(p.requires_grad for p in trainer.reference.model.parameters())
    assert not trainer.reference.model.training
    rows: Any = trainer.eval_dataset
    batch = trainer.data_collator(rows.__getitems__([0, 1, 2, 3]))
    sums = trainer.reference.sums(trainer.model, batch)
    expected = torch.stack([torch.stack(sums_by_hand(tiny_model(), rows[i])) for i in range(4)])
    torch.testing.assert_close(sums, expected.T.flatten())
    assert trainer.evaluate()["eval_rewards/margins"] != 0


@pytest.mark.parametrize("settings", [{}, LORA, ONCE], ids=["copy", "adapter", "precomputed"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, caplog, settings):
    common = {
        "max_steps": 7, "pairs": 10, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 4,
        "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    whole = trained(tmp_path / "whole", **settings | common)
    again = dpo_trainer(tmp_path / "again", **settings | common)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert torch.equal(parameters_of(again.model), parameters_of(whole.model))
    assert "its own reference" not in caplog.text


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_an_adapters_base_is_the_same_reference_as_a_copy(tmp_path, checkpointing):
    settings = {**LORA, "max_steps": 4}
    extra = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    base = trained(tmp_path, **settings, **(extra if checkpointing else {}))
    assert base.reference.model is None
    copied = trained(tmp_path, ref_model=tiny_model(), **settings)
    assert losses(base) == pytest.approx(losses(copied), rel=1e-5)
    assert losses(base)[-1] < 0.69
    torch.testing.assert_close(parameters_of(base.model), parameters_of(copied.model))


def test_an_adapter_that_changes_its_base_gets_a_copy(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa")
    trainer = trained(tmp_path, peft_config=config)
    assert trainer.reference.model is not None
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)


def test_a_model_that_comes_with_its_adapter(tmp_path, caplog):
    """Its reference has the adapter too: it is where training starts."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    trainer = trained(tmp_path, model=model)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(trainer)[-1] != losses(trainer)[0]
    assert "its own reference" not in caplog.text
    with pytest.raises(UserError, match="has an adapter already"):
        dpo_trainer(tmp_path, model=model, peft_config=config)


def test_a_first_loss_that_is_not_ln_2_is_explained_once(tmp_path, caplog):
    settings = tiny_config(tmp_path, objective="dpo", beta=0.5)
    rows = with_columns(REFERENCE_COLUMNS, shift=np.array([3.0, -3.0]))
    PreferenceTrainer(tiny_model(), settings, rows, processing_class=TOKENIZER).train()
    told = [r.getMessage() for r in caplog.records if "its own reference" in r.getMessage()]
    assert len(told) == 1
    assert "differ by 3 per completion" in told[0]
    assert "ln 2 = 0.6931" in told[0]


def test_dropout_left_on_is_noticed(tmp_path, caplog):
    trained(tmp_path, model=tiny_model(attention_dropout=0.5), disable_dropout=False)
    assert "disable_dropout" in caplog.text


@pytest.mark.parametrize("objective", ["dpo", "r-dpo", "ipo", "kto", "gamma-dpo", "beta-dpo"])
def test_every_objective_with_a_reference_trains(tmp_path, objective, caplog):
    trainer = trained(tmp_path, objective=objective)
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert not torch.equal(parameters_of(trainer.model), parameters_of(tiny_model()))
    assert "its own reference" not in caplog.text


def test_errors(tmp_path):
    with pytest.raises(UserError, match="simpo uses none"):
        dpo_trainer(tmp_path, objective="simpo", ref_model=tiny_model())
    with pytest.raises(UserError, match="simpo uses none"):
        dpo_trainer(tmp_path, objective="simpo", ref_model_name_or_path="some/model")
    with pytest.raises(UserError, match="vocabulary has 500 tokens"):
        dpo_trainer(tmp_path, ref_model=tiny_model(vocab_size=500))
    model = tiny_model()
    with pytest.raises(UserError, match="the model that trains"):
        dpo_trainer(tmp_path, model=model, ref_model=model)
    with pytest.raises(UserError, match="no such folder"):
        dpo_trainer(tmp_path, ref_model="./nowhere/at/all")
    broken = tiny_model()
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        dpo_trainer(tmp_path, ref_model=broken, packing="padded", **ONCE)


def test_a_named_reference_with_another_tokenizer(tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["<|more|>"])
    tiny_model().save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer"):
        dpo_trainer(tmp_path, ref_model=str(tmp_path / "other"))
    TOKENIZER.save_pretrained(tmp_path / "other")
    assert dpo_trainer(tmp_path, ref_model=str(tmp_path / "other")).reference.model is not None


SPLIT = {
    "precomputed": "precompute_ref_log_probs: true, learning_rate: 0.05",
    "adapter": "use_peft: true, lora_dropout: 0, learning_rate: 0.5",
}


@pytest.mark.costly
@pytest.mark.parametrize("how", SPLIT)
def test_two_ranks_equal_one(tmp_path, cache, monkeypatch, how):
    settings = f"objective: dpo, max_steps: 5, {SPLIT[how]}"
    datasets = {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    printed, losses = trained_alike(tmp_path, monkeypatch, tiny_pairs(11), settings, **datasets)
    assert "its own reference" not in printed
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4)
    if how == "precomputed":
        (kept,) = (tmp_path / "datasets" / "widemargin").glob("reference-*")
        assert [kept.name] == [path.name for path in cache.iterdir()]


def test_logging_is_on():
    """Else the tests above that nothing was warned of would prove nothing."""
    assert logging.getLogger("widemargin.trainer.reference.model").isEnabledFor(logging.WARNING)
