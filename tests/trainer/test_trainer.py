"""The trainer: exact means, trajectories, resume, metrics, distribution of pairs."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from widemargin.kernels import reference
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.checkpoint.files import MANIFEST
from widemargin.trainer.cli import main
from widemargin.trainer.data.table import FILLER_ID, PairRows
from widemargin.trainer.errors import UserError

from tests.support.tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_config,
    tiny_model,
    tiny_pairs,
    tiny_trainer,
)
from tests.support.two_ranks import launch


def trained(folder, **settings) -> torch.Tensor:
    trainer = tiny_trainer(folder, **settings)
    trainer.train()
    return parameters_of(trainer.model)


def test_a_step_by_hand(tmp_path):
    """One SGD step equals one written plainly with full logits and the definition of the loss."""
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model=tiny_model(), max_steps=1, beta=2.0, pairs=4)
    rows = [trainer.train_dataset[i] for i in range(4)]
    losses = []
    for row in rows:
        rewards = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([*row["prompt_ids"], *row[side]])
            n = len(row[side])
            hidden = model.model(ids[None]).last_hidden_state[0, -n - 1 : -1]
            logps = reference.linear_logprob(hidden, model.lm_head.weight, ids[-n:])
            rewards.append(2.0 * logps.mean())
        losses.append(torch.nn.functional.softplus(-(rewards[0] - rewards[1] - 1.0)))
    loss = torch.stack(losses).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(parameters_of(trainer.model), parameters_of(model))


def test_eight_micro_batches_of_one_equal_one_of_eight(tmp_path):
    common = {"max_steps": 10, "pairs": 30, "objective": "simpo"}
    whole = trained(tmp_path, per_device_train_batch_size=8, **common)
    cut = trained(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, **common)
    assert (whole - cut).abs().max() < 1e-5
    assert (whole - parameters_of(tiny_model())).abs().max() > 1e-2


@pytest.mark.costly
@pytest.mark.parametrize("objective", ["lmpo", "gamma-simpo", "simpo"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, objective):
    """Stopped in the middle of the second epoch, with the last step of each epoch ragged."""
    common = {
        "objective": objective, "max_steps": 9, "pairs": 10, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 5,
        "optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
        "head_tail": "mean",
    }  # fmt: skip
    uninterrupted = trained(tmp_path / "whole", **common)
    trainer = tiny_trainer(tmp_path / "again", model=tiny_model(seed=7), **common)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert torch.equal(parameters_of(trainer.model), uninterrupted)


@pytest.mark.parametrize("logging_steps", [1, 2, 9])
def test_a_resumed_run_reports_all_of_its_loss_and_time(tmp_path, logging_steps):
    common = {
        "max_steps": 4, "save_strategy": "steps", "save_steps": 3, "logging_steps": logging_steps,
    }  # fmt: skip
    whole = tiny_trainer(tmp_path / "whole", **common)
    expected = whole.train()
    manifest = tmp_path / "whole" / "checkpoint-3" / MANIFEST
    before = json.loads(manifest.read_text())["run"]["progress"]["seconds"]
    again = tiny_trainer(tmp_path / "again", **common)
    resumed = again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.training_loss == expected.training_loss
    assert resumed.metrics["train_runtime"] >= before
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (whole, again)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("token_metrics", [False, True])
def test_a_resumed_run_logs_the_metrics_of_all_steps_since_the_last_entry(tmp_path, token_metrics):
    """Also where the same trainer goes on, which has more steps behind it than the checkpoint."""
    common = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "pairs": 10,
        "token_metrics": token_metrics,
    }  # fmt: skip
    trainer = tiny_trainer(tmp_path / "whole", **common)
    trainer.train()
    expected = measured(trainer)
    assert len(expected) == 2
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    again = tiny_trainer(tmp_path / "again", **common)
    again.train(resume_from_checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert measured(again) == measured(trainer) == expected
    manifest = json.loads((tmp_path / "whole" / "checkpoint-3" / MANIFEST).read_text())
    assert manifest["run"]["progress"]["sums_seconds"] > 0


def measured(trainer):
    """The entries of training in a log, without what depends on time and memory."""
    return [
        {key: value for key, value in entry.items() if not key.endswith(("_per_s", "_mib"))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def test_token_metrics_asked_for_on_the_way_are_means_of_the_steps_that_have_them(tmp_path):
    common = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3, "learning_rate": 1e-9}
    tiny_trainer(tmp_path / "without", **common).train()
    whole = tiny_trainer(tmp_path / "with", token_metrics=True, **common)
    whole.train()
    again = tiny_trainer(tmp_path / "again", token_metrics=True, **common)
    again.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-1"))
    (entry,), (expected,) = measured(again), measured(whole)
    assert entry["entropy"] == pytest.approx(expected["entropy"], rel=0.1)


def test_a_finished_run_taken_up_again_keeps_its_loss(tmp_path):
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    expected = tiny_trainer(tmp_path, **common).train()
    again = tiny_trainer(tmp_path / "again", **common)
    resumed = again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.training_loss == expected.training_loss > 0


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, objective="simpo", **settings)
    trainer = tiny_trainer(tmp_path / "other", objective="lmpo", **settings)
    with pytest.raises(UserError, match="objective name was simpo, is lmpo"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_metrics_and_evaluation(tmp_path):
    trainer = tiny_trainer(
        tmp_path, objective="lmpo", eval_pairs=7, eval_strategy="steps", eval_steps=2,
        eval_on_start=True, max_steps=4, logging_steps=2, head_tail="mean",
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    logs = next(entry for entry in history if "loss" in entry)
    expected = {
        "loss", "grad_norm", "learning_rate", "rewards/chosen", "rewards/rejected",
        "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "logits/chosen",
        "logits/rejected", "lengths/chosen", "lengths/rejected", "margin/mean", "margin/std",
        "tokens_per_s", "pairs_per_s", "peak_memory_mib", "head/averaged_mass",
        "head/active_fraction",
    }  # fmt: skip
    assert expected <= logs.keys()
    held_out = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in held_out] == [0, 2, 4]
    lengths = [len(trainer.eval_dataset[i]["chosen_ids"]) for i in range(7)]
    for entry in held_out:
        assert entry["eval_lengths/chosen"] == pytest.approx(sum(lengths) / len(lengths))
        assert entry["eval_rewards/accuracies"] * 7 == pytest.approx(
            round(entry["eval_rewards/accuracies"] * 7)
        )
        margin = entry["eval_rewards/chosen"] - entry["eval_rewards/rejected"]
        assert entry["eval_rewards/margins"] == pytest.approx(margin)


def test_evaluation_is_the_mean_over_pairs_and_changes_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, objective="lmpo", eval_pairs=7, max_steps=2)
    trainer.train()
    state = {k: v.clone() for k, v in trainer.objective.state_dict().items()}
    sizes = []
    for size in (1, 3, 7):
        trainer.args.per_device_eval_batch_size = size
        sizes.append(trainer.evaluate()["eval_loss"])
    assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-5)
    assert all(torch.equal(state[k], v) for k, v in trainer.objective.state_dict().items())


def test_evaluation_reports_the_metrics_by_their_names(tmp_path):
    from widemargin.trainer.settings.names import METRICS

    reported = tiny_trainer(tmp_path, eval_pairs=3).evaluate()
    names = {name.removeprefix("eval_") for name in reported}
    assert names >= set(METRICS)
    ours = {name for name in names if "/" in name}
    assert ours <= set(METRICS)


def test_unused_columns_are_no_matter(tmp_path):
    assert torch.equal(trained(tmp_path), trained(tmp_path, remove_unused_columns=True))


def test_saved_model_loads_and_generates(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(parameters_of(model), parameters_of(trainer.model))
    assert model.generate(torch.tensor([[0, 5]]), max_new_tokens=3).shape[1] > 2


def test_lora(tmp_path):
    from peft import LoraConfig

    model = tiny_model()
    frozen = model.lm_head.weight.detach().clone()
    trainer = PreferenceTrainer(
        model,
        tiny_config(tmp_path, max_steps=2),
        train_dataset=tiny_pairs(),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
    )
    trainer.train()
    moved = [p for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert all((p != 0).any() for p in moved)
    assert torch.equal(model.lm_head.weight, frozen)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = trained(tmp_path, max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        checkpointed = trained(tmp_path, max_steps=2, gradient_checkpointing=True)
    torch.testing.assert_close(plain, checkpointed)


def test_tokenized_data_gives_the_same(tmp_path):
    from widemargin.trainer.data import tokenize_pairs

    settings = tiny_config(tmp_path)
    pairs, _ = tokenize_pairs(tiny_pairs(), TOKENIZER, settings)
    trainer = PreferenceTrainer(
        tiny_model(), settings, train_dataset=pairs, processing_class=TOKENIZER
    )
    trainer.train()
    assert torch.equal(parameters_of(trainer.model), trained(tmp_path))


def test_errors(tmp_path):
    with pytest.raises(UserError, match="none is named"):
        tiny_trainer(tmp_path, objective=None)
    with pytest.raises(UserError, match="no evaluation data"):
        tiny_trainer(tmp_path, eval_strategy="steps")
    with pytest.raises(UserError, match="ref_model"):
        PreferenceTrainer(
            tiny_model(), tiny_config(tmp_path), tiny_pairs(), None, TOKENIZER, tiny_model()
        )
    with pytest.raises(UserError, match=r"train_dataset.*from_list"):
        PreferenceTrainer(tiny_model(), tiny_config(tmp_path), [1, 2], None, TOKENIZER)
    with pytest.raises(UserError, match="vocabulary"):
        PreferenceTrainer(
            tiny_model(vocab_size=20), tiny_config(tmp_path), tiny_pairs(), None, TOKENIZER
        )


def test_fillers_weigh_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, pairs=3)
    rows: Any = trainer.train_dataset
    assert isinstance(rows, PairRows)
    plain = trainer.data_collator(rows.__getitems__([0, 2]))
    filled = trainer.data_collator(rows.__getitems__([0, 2, FILLER_ID - 1]))
    assert filled["pair_ids"].tolist() == [0, 2, FILLER_ID]
    items = trainer._get_num_items_in_batch([filled], torch.device("cpu"))
    assert items == 2
    model = trainer.model.train()
    losses = [trainer.compute_loss(model, b, num_items_in_batch=items) for b in (plain, filled)]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.costly
def test_two_ranks_equal_one(tmp_path, monkeypatch):
    """Ten steps of LMPO on two processes, ragged at the end of each epoch, and evaluation too.

    The launch is a fresh one: others of this suite are of forks, which import nothing.
    """
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_pairs(21).to_json(tmp_path / "train.jsonl")
    tiny_pairs(7, seed=1).to_json(tmp_path / "test.jsonl")
    (tmp_path / "config.yaml").write_text(
        "{model_name_or_path: ./model, dataset: train.jsonl, eval_dataset: test.jsonl, "
        "objective: lmpo, optim: sgd, learning_rate: 0.05, lr_scheduler_type: constant, "
        "max_grad_norm: 0.0, head_tail: exact, max_steps: 10, logging_steps: 5, "
        "gradient_accumulation_steps: 2, eval_strategy: steps, eval_steps: 5, "
        "save_strategy: 'no', use_cpu: true, write_report: false}"
    )
    monkeypatch.chdir(tmp_path)
    one = ["config.yaml", "--per_device_train_batch_size=4", "--output_dir=one"]
    assert main(["train", *one]) == 0
    two = ["config.yaml", "--per_device_train_batch_size=2", "--output_dir=two"]
    two = ["-m", "widemargin.trainer", *two, "--ddp_backend=gloo"]
    done = launch(tmp_path, *two, fresh=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        parameters_of(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        for name in ("one", "two")
    )
    assert (one - two).abs().max() < 1e-6
    logs = [
        [
            {k: v for k, v in entry.items() if "rewards" in k or "margin" in k or k == "eval_loss"}
            for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())[
                "log_history"
            ]
        ]
        for name in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1])
    for first, second in zip(*logs, strict=True):
        assert first == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_of_another_data_set(tmp_path, workers):
    """Raw, and not mistaken for the run's own where workers stay."""
    trainer = tiny_trainer(
        tmp_path, eval_pairs=4, dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )  # fmt: skip
    reports = dict(trainer.pipeline.reports)
    own = trainer.evaluate()["eval_loss"]
    other = trainer.evaluate(tiny_pairs(9, seed=7))["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == own
    assert trainer.evaluate({"a": tiny_pairs(9, seed=7)})["eval_a_loss"] == other
    assert trainer.pipeline.reports == reports
    fresh = tiny_trainer(tmp_path, eval_pairs=4)
    fresh.eval_dataset = fresh.pipeline.evaluation_rows(tiny_pairs(9, seed=7))
    assert fresh.evaluate()["eval_loss"] == pytest.approx(other)
    assert own != other
