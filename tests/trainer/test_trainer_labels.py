"""Training on single answers with labels: reading them, KTO's KL, any ranks and layouts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from datasets import Dataset
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.cli import main
from widemargin.trainer.data import tokenize_pairs
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.data.table.mismatched import neighbours
from widemargin.trainer.errors import UserError

from tests.support.reference_runs import sums_by_hand
from tests.support.tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_config,
    tiny_model,
    tiny_pairs,
)
from tests.support.two_ranks import trained_alike

NO_GRADIENTS = ("mismatched_", "frozen_")


def labelled(count: int = 12, **columns: Any) -> Dataset:
    """Of every pair of `tiny_pairs` one answer; every third is undesirable."""
    rows = [
        {"prompt": r["prompt"], "completion": r["rejected" if i % 3 == 2 else "chosen"],
         "label": i % 3 != 2}
        for i, r in enumerate(tiny_pairs(count).to_list())
    ]  # fmt: skip
    return Dataset.from_list([row | columns for row in rows])


def trainer_of(
    folder, data: Any = None, ref_model: Any = None, **settings: Any
) -> PreferenceTrainer:
    settings = {
        "objective": "kto", "beta": 0.5, "per_device_train_batch_size": 6,
        "objective_args": {"kl_estimate": "mismatched"},
    } | settings  # fmt: skip
    return PreferenceTrainer(
        tiny_model(),
        tiny_config(folder, **settings),
        ref_model=ref_model,
        train_dataset=labelled() if data is None else data,
        eval_dataset=labelled(5),
        processing_class=TOKENIZER,
    )


@pytest.mark.parametrize("label", [True, 1, 1.0, "true", "True", "1"])
def test_labels_in_every_form(tmp_path, label):
    rows = [{"prompt": "a", "completion": " b", "label": label}]
    pairs, report = tokenize_pairs(
        Dataset.from_list(rows), TOKENIZER, tiny_config(tmp_path, objective="kto")
    )
    assert pairs[0]["desirable"] == 1.0
    assert pairs[0]["chosen_ids"] == pairs[0]["rejected_ids"] != []
    assert "read as single answers with labels" in "\n".join(report.lines())


def test_labels_that_say_nothing_are_rows_skipped_and_counted(tmp_path):
    rows = [{"prompt": "a", "completion": " b", "label": x} for x in ("no", None, "false", "-1")]
    pairs, report = tokenize_pairs(
        Dataset.from_list(rows), TOKENIZER, tiny_config(tmp_path, objective="kto")
    )
    assert [row["desirable"] for row in pairs] == [0.0]
    assert sum(report.skipped.values()) == 3
    assert "label is 'no', neither true nor false, 1 nor 0" in "\n".join(report.lines())


def test_conversations_load_too(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "yes"}], "label": False,
         "completion": [{"role": "assistant", "content": "no"}]}
    ]  # fmt: skip
    pairs, _ = tokenize_pairs(
        Dataset.from_list(rows), TOKENIZER, tiny_config(tmp_path, objective="kto")
    )
    assert pairs[0]["desirable"] == 0.0
    assert pairs[0]["chosen_ids"] == pairs[0]["rejected_ids"] != []


def test_each_answer_runs_once(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=12)
    (batch,) = trainer.get_train_dataloader()
    assert len(batch["cu_seqlens"]) - 1 == 12
    assert batch["edges"][:, 0].tolist() == batch["edges"][:, 1].tolist()
    assert int(batch["labels"].sum()) == 8
    assert len(batch["mismatched_cu_seqlens"]) - 1 == 12
    lines = trainer.pipeline.summary(trainer.train_dataset).lines()  # pyright: ignore
    assert "12 answers a step" in lines[0]
    assert batch["decoder_tokens"][2] >= batch["decoder_tokens"][1]


def test_the_mismatched_answers_are_those_of_the_batch(tmp_path):
    """After another prompt each, as the other models see them."""
    trainer = trainer_of(tmp_path, packing="padded", per_device_train_batch_size=12)
    (batch,) = trainer.get_train_dataloader()

    def answers(prefix: str) -> list[tuple[int, ...]]:
        bounds = batch[f"{prefix}cu_seqlens"].tolist()
        targets = batch[f"{prefix}targets"].tolist()
        return [tuple(targets[a:b]) for a, b in itertools.pairwise(bounds)]

    assert sorted(answers("")) == sorted(answers("mismatched_"))
    by_id = dict(zip(batch["pair_ids"].tolist(), answers(""), strict=True))
    other = dict(zip(batch["pair_ids"].tolist(), answers("mismatched_"), strict=True))
    prompts = trainer.train_dataset.prompts  # pyright: ignore
    assert all(
        other[i] == by_id[(i - 1) % 12] for i in by_id if prompts[i] != prompts[(i - 1) % 12]
    )


def several() -> Dataset:
    """Three answers to each of three prompts."""
    prompts = ["User: yes no Assistant:", "User: Paris Assistant:", "User: water Assistant:"]
    rows = [row | {"prompt": prompts[i // 3]} for i, row in enumerate(labelled(9).to_list())]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("packing", ["padded", "packed", "auto"])
@pytest.mark.parametrize("grouped", [False, True])
def test_both_models_score_every_answer_of_a_batch_by_itself(tmp_path, packing, grouped):
    """Own answers and their neighbours', each with full logits."""
    trainer: Any = trainer_of(
        tmp_path, several(), packing=packing, group_by_prompt=grouped, max_steps=1,
        per_device_train_batch_size=9, ref_model=tiny_model(seed=3),
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    rows, order = trainer.train_dataset, batch["pair_ids"].tolist()
    found = neighbours(order, rows.prompts)
    with torch.no_grad():
        reference, answers = trainer.reference.compared(trainer.model, batch)
        models = [tiny_model(), tiny_model(seed=3)]
        own = [sums_by_hand(models[1], rows[i])[0] for i in order]
        other = [rows[i] | {"chosen_ids": rows[found[i]]["chosen_ids"]} for i in order]
        policy, frozen = ([sums_by_hand(model, row)[0] for row in other] for model in models)
    torch.testing.assert_close(
        reference[batch["edges"][:, 0]], torch.stack(own), rtol=1e-4, atol=1e-4
    )
    gained = torch.stack(policy) - torch.stack(frozen)
    torch.testing.assert_close(answers.mismatched, gained, rtol=1e-4, atol=1e-4)
    assert gained.abs().min() > 0


def test_every_prompt_runs_once_without_gradients(tmp_path):
    """In front of its own answers and its neighbours', each once, in the frozen model."""
    trainer: Any = trainer_of(
        tmp_path, several(), group_by_prompt=True, per_device_train_batch_size=9
    )
    (batch,) = trainer.get_train_dataloader()
    rows = [trainer.train_dataset[i] for i in batch["pair_ids"].tolist()]
    prompts = sum({row["tree_id"]: len(row["prompt_ids"]) for row in rows}.values())
    own = sum({row["leaf_ids"][0]: len(row["chosen_ids"]) for row in rows}.values())
    tokens = {name: int((batch[name + "segment_ids"] >= 0).sum()) for name in ("", *NO_GRADIENTS)}
    assert trainer.pipeline.layout == "prefix_shared"
    assert len(batch["mismatched_cu_seqlens"]) - 1 == 3
    assert tokens[""] == prompts + own
    assert tokens["frozen_"] == tokens["mismatched_"] + own


@pytest.mark.parametrize("objective", ["kto", "apo-zero-unpaired"])
def test_layouts_and_grouping_change_nothing(tmp_path, objective):
    """Nor accumulation, where nothing is estimated from the batch."""
    settings: dict[str, Any] = {"objective": objective}
    if objective != "kto":
        settings["objective_args"] = {"desirable_weight": 1.5}
    weights, logs = [], []
    variants: list[dict[str, Any]] = [{"packing": p} for p in ("padded", "packed", "auto")]
    if objective != "kto":
        variants.append({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3})
    for variant in variants:
        trainer = trainer_of(tmp_path, **settings | variant)
        trainer.train()
        weights.append(parameters_of(trainer.model))
        logs.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        logs[-1].append(trainer.evaluate()["eval_loss"])
    for other, log in zip(weights[1:], logs[1:], strict=True):
        assert (other - weights[0]).abs().max() < 1e-5
        assert log == pytest.approx(logs[0], rel=1e-4)
    assert (weights[0] - parameters_of(tiny_model())).abs().max() > 1e-4


def test_answers_to_one_prompt_share_it(tmp_path):
    rows = labelled(4).to_list()
    rows = [row | {"prompt": "User: yes no Assistant:"} for row in rows] + labelled(4).to_list()
    settings: dict[str, Any] = {"per_device_train_batch_size": 8, "max_steps": 2}
    settings |= {"objective": "apo-zero-unpaired", "objective_args": {}}
    plain, trees = (
        trainer_of(tmp_path, Dataset.from_list(rows), group_by_prompt=grouped, **settings)
        for grouped in (False, True)
    )
    for each in (plain, trees):
        each.train()
    assert (parameters_of(plain.model) - parameters_of(trees.model)).abs().max() < 1e-5
    tokens = [
        t.pipeline.summary(t.train_dataset).tokens  # pyright: ignore
        for t in (trees, plain)
    ]
    assert tokens[0] < tokens[1]


def test_the_log_has_each_label_by_itself(tmp_path):
    trainer = trainer_of(tmp_path, per_device_train_batch_size=12, max_steps=2)
    trainer.train()
    first, second = (e for e in trainer.state.log_history if "loss" in e)
    assert first["loss"] == pytest.approx(0.5)
    assert first["rewards/chosen"] == first["rewards/rejected"] == pytest.approx(0, abs=1e-6)
    gap = second["rewards/chosen"] - second["rewards/rejected"]
    assert second["rewards/margins"] == pytest.approx(gap)
    assert second["rewards/margins"] > 0
    rows = trainer.train_dataset
    lengths = [len(rows[i]["chosen_ids"]) for i in range(12)]  # pyright: ignore
    chosen = [n for i, n in enumerate(lengths) if i % 3 != 2]
    assert first["lengths/chosen"] == pytest.approx(sum(chosen) / 8)
    assert first["lengths/rejected"] == pytest.approx((sum(lengths) - sum(chosen)) / 4)
    alike = Dataset.from_list([row | {"label": True} for row in labelled().to_list()])
    trainer = trainer_of(tmp_path, alike, max_steps=1)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert "rewards/chosen" in entry
    assert not {"rewards/rejected", "rewards/margins", "lengths/rejected"} & entry.keys()


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 6, "save_strategy": "steps",
        "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3,
    }  # fmt: skip
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    again = trainer_of(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(parameters_of(whole.model), parameters_of(again.model))


def test_data_and_objective_that_do_not_fit_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="take kto or apo-zero-unpaired, as train_dataset has sin"):
        trainer_of(tmp_path, objective="dpo", objective_args={})
    with pytest.raises(UserError, match="take one of pairs, such as apo-zero or kto with kl_est"):
        trainer_of(tmp_path, tiny_pairs(4))
    with pytest.raises(UserError, match="take one of pairs"):
        trainer_of(tmp_path, tiny_pairs(4), objective="apo-zero-unpaired", objective_args={})
    pairs = tokenize_pairs(labelled(), TOKENIZER, tiny_config(tmp_path, objective="kto"))[0]
    with pytest.raises(UserError, match="take kto or apo-zero-unpaired"):
        trainer_of(tmp_path, pairs, objective="simpo", beta=2.0, objective_args={})
    for name, given in (("flip", {"flip": 0.5}), ("ld_alpha", {"objective_args": {"ld_alpha": 0}})):
        with pytest.raises(UserError, match=f"{name}: "):
            trainer_of(tmp_path, **given)
    with pytest.raises(UserError, match="kl_estimate: set it to batch, or leave out precompute"):
        trainer_of(tmp_path, precompute_ref_log_probs=True)


def test_a_yaml_that_does_not_fit_its_data_stops_in_the_preflight(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    labelled().to_json(tmp_path / "single.jsonl")
    tiny_pairs(4).to_json(tmp_path / "pairs.jsonl")
    common = [f"--model_name_or_path={tmp_path / 'model'}", f"--output_dir={tmp_path / 'run'}"]
    config = tmp_path / "config.yaml"
    config.write_text("{use_cpu: true}")

    def preflight(data: str, *settings: str) -> tuple[int, str]:
        path = f"--dataset={tmp_path / data}"
        code = main(["train", str(config), path, *common, *settings, "--preflight"])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = preflight("single.jsonl", "--objective=dpo")
    assert code != 0
    assert "take kto or apo-zero-unpaired" in said
    code, said = preflight("pairs.jsonl", "--objective=kto", "--kl_estimate=mismatched")
    assert code != 0
    assert "take one of pairs" in said
    code, said = preflight("single.jsonl", "--objective=kto", "--kl_estimate=mismatched")
    assert code == 0
    assert "answers a step" in said


def test_pairs_and_single_answers_do_not_mix(tmp_path):
    from widemargin.trainer.data import load_pairs

    labelled(4).to_json(tmp_path / "a.jsonl")
    tiny_pairs(4).to_json(tmp_path / "b.jsonl")
    mixer = {str(tmp_path / f"{name}.jsonl"): 1.0 for name in "ab"}
    with pytest.raises(UserError, match="some have pairs and some single answers"):
        load_pairs(tiny_config(tmp_path, objective="kto", dataset_mixer=mixer), TOKENIZER)


def test_a_column_of_labels_beside_pairs_is_not_read(tmp_path):
    pairs = tiny_pairs(4).add_column("label", [True] * 4)
    tokens, report = tokenize_pairs(pairs, TOKENIZER, tiny_config(tmp_path))
    assert "desirable" not in tokens.column_names
    assert not PairRows(tokens).single
    assert "nothing reads its columns label" in "\n".join(report.lines())


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path, monkeypatch):
    settings = "objective: kto, kl_estimate: mismatched, max_steps: 5, learning_rate: 0.05"
    trained_alike(tmp_path, monkeypatch, labelled(13), settings)
