"""`PreferenceTrainer` with what TRL's trainers are given: it runs, or says what to do."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
from datasets import IterableDataset
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, EvalPrediction
from widemargin.trainer import PreferenceConfig, PreferenceTrainer
from widemargin.trainer.errors import UserError
from widemargin.trainer.loop.arguments import _ORDER
from widemargin.trainer.objectives import build_objective
from widemargin.trainer.reference import cache

from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs
from tests.support.tiny_tokenizers import tiny_tokenizer

ONCE = {"precompute_ref_log_probs": True}
QUANTIZED = BitsAndBytesConfig(load_in_8bit=True)
REFUSED = [
    ({"args": None}, r"args: expected .* got none; PreferenceConfig\(objective='dpo'\)"),
    ({"preprocess_logits_for_metrics": max}, "leave it out; evaluation makes no logits"),
    ({"model_init": tiny_model}, "model_init: given beside model"),
    ({"quantization_config": QUANTIZED}, "the model is loaded already"),
    ({"model": "x", "quantization_config": QUANTIZED}, "give peft_config"),
    ({"peft_config": PromptTuningConfig(num_virtual_tokens=2)}, "use LoRA or another adapter"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused_with_what_to_do(tmp_path, change, message):
    given = {"model": tiny_model(), "args": tiny_config(tmp_path), "train_dataset": tiny_pairs()}
    with pytest.raises(UserError, match=message):
        PreferenceTrainer(**{**given, "processing_class": TOKENIZER, **change})


def test_trls_orders_are_told_apart(tmp_path):
    model, args, pairs = tiny_model(), tiny_config(tmp_path), tiny_pairs()
    with pytest.raises(
        UserError, match=r"DPOTrainer has them third.*here the order is model, args"
    ):
        PreferenceTrainer(model, None, args, None, pairs, None, TOKENIZER)
    with pytest.raises(UserError, match="CPOTrainer has data_collator before it"):
        PreferenceTrainer(model, args, None, pairs, pairs, TOKENIZER)
    with pytest.raises(UserError, match="CPOTrainer has data_collator before it"):
        PreferenceTrainer(model, args, None, pairs, None, TOKENIZER)


def test_the_order_that_is_said_is_the_one_there_is():
    said = _ORDER.partition("order is ")[2].partition(";")[0].split(", ")
    assert said == list(inspect.signature(PreferenceTrainer).parameters)[: len(said)]


def test_settings_are_made_where_an_objective_says_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreferenceConfig, "use_cpu", True)
    made = PreferenceTrainer(
        model_init=tiny_model,
        train_dataset=tiny_pairs(),
        processing_class=TOKENIZER,
        objective=build_objective("simpo"),
    )
    assert made.args.output_dir == "outputs/run"


def test_a_model_made_for_a_trial_is_made_without_one(tmp_path):
    asked = []

    def make(trial):
        asked.append(trial)
        return tiny_model()

    made = PreferenceTrainer(
        model_init=make, args=tiny_config(tmp_path), processing_class=TOKENIZER
    )
    assert asked == [None]
    with pytest.raises(UserError, match="a PreferenceTrainer for each trial"):
        made.hyperparameter_search(n_trials=1)


def test_a_metric_of_ones_own_decides_which_model_is_the_best(tmp_path):
    values = iter([0.5, 0.9, 0.1])
    trainer = PreferenceTrainer(
        tiny_model(),
        tiny_config(
            tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            metric_for_best_model="mine", load_best_model_at_end=True,
        ),
        tiny_pairs(),
        eval_dataset=tiny_pairs(3, seed=1),
        processing_class=TOKENIZER,
        compute_metrics=lambda _: {"mine": next(values)},
    )  # fmt: skip
    trainer.train()
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.9, 2)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    bare = tiny_tokenizer()
    bare.pad_token = None
    losses = []
    for tokenizer in (bare, TOKENIZER):
        made = PreferenceTrainer(
            *(tiny_model(), tiny_config(tmp_path, packing="padded"), tiny_pairs()),
            eval_dataset=tiny_pairs(),
            processing_class=tokenizer,
        )
        losses.append(made.evaluate()["eval_loss"])
    assert bare.pad_token == bare.eos_token
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_compute_metrics_gets_rewards_in_the_datas_order(tmp_path):
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        best = np.asarray(prediction.predictions).argmax(axis=1)
        return {"right": float((best == prediction.label_ids).mean()), "eval_pairs": len(best)}

    trainer = PreferenceTrainer(
        *(tiny_model(), tiny_config(tmp_path)),
        processing_class=TOKENIZER,
        compute_metrics=metrics,
    )
    pairs = tiny_pairs(7, seed=3)
    found = trainer.evaluate(pairs)
    assert found["eval_pairs"] == 7
    assert found["eval_right"] == pytest.approx(found["eval_rewards/accuracies"])
    chosen, rejected = np.asarray(seen[0].predictions).mean(axis=0)
    assert chosen == pytest.approx(found["eval_rewards/chosen"], rel=1e-5)
    assert rejected == pytest.approx(found["eval_rewards/rejected"], rel=1e-5)
    trainer.evaluate(pairs.select(range(6, -1, -1)))
    assert seen[1].predictions[::-1] == pytest.approx(seen[0].predictions, rel=1e-5)


def test_a_stream_trains_as_the_data_set_that_it_is(tmp_path):
    pairs = tiny_pairs(9)
    stream = pairs.to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    losses = []
    for data in (pairs, stream):
        made = PreferenceTrainer(
            *(tiny_model(), tiny_config(tmp_path / str(len(losses)), max_steps=2), data),
            processing_class=TOKENIZER,
        )
        losses.append(made.train().training_loss)
    assert losses[0] == losses[1]


def test_an_endless_stream_is_read_as_far_as_the_setting_says(tmp_path):
    def forever():
        while True:
            yield from tiny_pairs(4)

    args = tiny_config(tmp_path, max_train_samples=10)
    endless = IterableDataset.from_generator(forever)
    made = PreferenceTrainer(tiny_model(), args, endless, processing_class=TOKENIZER)
    assert len(made.train_dataset) == 10


def test_a_stream_that_breaks_says_so(tmp_path):
    def broken():
        raise RuntimeError("the server is gone")
        yield {}

    with pytest.raises(UserError, match="the server is gone"):
        PreferenceTrainer(
            tiny_model(),
            tiny_config(tmp_path),
            IterableDataset.from_generator(broken),
            processing_class=TOKENIZER,
        )


def test_a_new_set_is_evaluated_under_precomputed_references_of_a_base(tmp_path):
    """An adapter leaves its base there to score with."""
    made = PreferenceTrainer(
        *(tiny_model(), tiny_config(tmp_path, objective="dpo", **ONCE), tiny_pairs()),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    assert made.evaluate(tiny_pairs(3, seed=5))["eval_loss"] == pytest.approx(math.log(2))


@pytest.mark.costly
@pytest.mark.parametrize("named", ["model", "reference", "object"])
def test_a_new_set_is_evaluated_after_the_frozen_model_is_gone(tmp_path, named, monkeypatch):
    """It is loaded again by its name; another run keeps it in memory, and finds the same."""
    monkeypatch.setattr(cache, "cache_folder", lambda: str(tmp_path / "cache"))
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_model(seed=3).save_pretrained(tmp_path / "other")
    given = {"ref_model_name_or_path": str(tmp_path / "other")} if named == "reference" else {}
    found = []
    for once in ({}, ONCE):
        place = str(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(place) if named == "object" else place
        args = tiny_config(tmp_path / "run", objective="dpo", **given, **once)
        made = PreferenceTrainer(model, args, tiny_pairs(), processing_class=TOKENIZER)
        made.train()
        found.append([made.evaluate(tiny_pairs(3, seed=5))["eval_loss"] for _ in range(2)])
        assert made.reference is not None
        assert (made.reference.model is None) == bool(once)
    assert found[0][0] != pytest.approx(math.log(2), abs=1e-3)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_frozen_model_that_is_gone_is_not_replaced_by_another(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    for model in (str(tmp_path / "model"), tiny_model()):
        args = tiny_config(tmp_path, objective="dpo", **ONCE)
        made = PreferenceTrainer(model, args, tiny_pairs(), processing_class=TOKENIZER)
        tiny_model(seed=4).save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match="give this data set as eval_dataset from the start"):
            made.evaluate(tiny_pairs(4, seed=6))
