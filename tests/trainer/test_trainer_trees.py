"""Training on trees: the same pairs, the same losses, fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.data import tokenize_pairs
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.errors import UserError

from tests.support.tiny_models import TOKENIZER, parameters_of, tiny_config, tiny_model
from tests.support.tree_pairs import text_trees

EXACT = ("pairs_per_s", "tokens", "epoch", "memory", "runtime", "per_second", "head/", "flos")


def trainer_of(folder, **settings) -> PreferenceTrainer:
    return PreferenceTrainer(
        tiny_model(),
        tiny_config(folder, **settings),
        train_dataset=text_trees(),
        eval_dataset=text_trees(2, 3),
        processing_class=TOKENIZER,
    )


def logs(trainer) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in entry.items() if not any(part in k for part in EXACT)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("objective", ["simpo", "lmpo", "dpo"])
def test_grouped_pairs_train_as_the_same_pairs_one_by_one(tmp_path, objective):
    """A step of all pairs: losses, metrics and weights are those of pairs that share nothing."""
    settings = {"objective": objective, "per_device_train_batch_size": 12, "max_steps": 4}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    plain = trainer_of(tmp_path, **settings)
    trees = trainer_of(tmp_path, group_by_prompt=True, **settings)
    for each in (plain, trees):
        each.train()
    assert (parameters_of(plain.model) - parameters_of(trees.model)).abs().max() < 1e-5
    assert (parameters_of(plain.model) - parameters_of(tiny_model())).abs().max() > 1e-2
    for ours, theirs in zip(logs(trees), logs(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    share = [t.state.log_history[0]["tokens/computed_vs_padded"] for t in (trees, plain)]
    assert share[0] < 0.75 * share[1]


def test_the_reference_scores_every_answer_once(tmp_path, monkeypatch, own_cache):
    import widemargin.trainer.reference.model as reference

    scored = []
    original = reference._summed_logps
    monkeypatch.setattr(
        reference, "_summed_logps", lambda *a: scored.append(original(*a)) or scored[-1]
    )
    settings = {"objective": "dpo", "precompute_ref_log_probs": True}
    settings |= {"per_device_eval_batch_size": 12}
    plain = trainer_of(tmp_path, **settings)
    assert sum(map(len, scored)) == 2 * 12 + 2 * 12  # the last batch is filled
    monkeypatch.setattr("widemargin.trainer.reference.cache.read", lambda *_: None)
    scored.clear()
    trees = trainer_of(tmp_path, group_by_prompt=True, **settings)
    assert sum(map(len, scored)) == 4 * 4 + 2 * 3
    for i in range(12):
        for name in ("reference_chosen_logps", "reference_rejected_logps"):
            ours, theirs = (t.train_dataset[i][name] for t in (trees, plain))
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    settings: dict[str, Any] = {
        "objective": "lmpo", "per_device_train_batch_size": 5, "group_by_prompt": True,
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }  # fmt: skip
    whole = trainer_of(tmp_path / "whole", **settings)
    whole.train()
    again = trainer_of(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(parameters_of(whole.model), parameters_of(again.model))
    other = trainer_of(tmp_path / "other", **settings | {"group_by_prompt": False})
    with pytest.raises(Exception, match="group_by_prompt was True, is False"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_rows_without_trees_are_grouped_where_settings_ask_for_it(tmp_path):
    rows = PairRows(trainer_of(tmp_path).train_dataset.dataset)  # pyright: ignore
    trainer = PreferenceTrainer(
        tiny_model(),
        tiny_config(tmp_path, group_by_prompt=True),
        train_dataset=rows,
        processing_class=TOKENIZER,
    )
    assert len(trainer.train_dataset.trees) == 4  # pyright: ignore


def weighted(folder, pairs, **settings) -> PreferenceTrainer:
    trainer = PreferenceTrainer(
        tiny_model(),
        tiny_config(folder, per_device_train_batch_size=len(pairs), max_steps=1, **settings),
        train_dataset=pairs,
        processing_class=TOKENIZER,
    )
    trainer.train()
    return trainer


def test_weight_two_is_the_pair_twice(tmp_path):
    """Their gradients: a mean over 12 pairs, of which one weighs 2, and over those 13."""
    rows = list(text_trees())
    once = weighted(tmp_path, Dataset.from_list([r | {"weight": 1.0} for r in rows]))
    plain = weighted(tmp_path, Dataset.from_list(rows))
    assert torch.equal(parameters_of(once.model), parameters_of(plain.model))
    heavy = [r | {"weight": 2.0 if i == 3 else 1.0} for i, r in enumerate(rows)]
    heavy_steps = parameters_of(weighted(tmp_path, Dataset.from_list(heavy)).model)
    twice = parameters_of(weighted(tmp_path, Dataset.from_list([*rows, rows[3]])).model)
    start = parameters_of(tiny_model())
    torch.testing.assert_close(
        (heavy_steps - start) * 12, (twice - start) * 13, rtol=1e-3, atol=1e-4
    )
    assert (heavy_steps - parameters_of(plain.model)).abs().max() > 1e-3


def test_every_prompt_weighs_alike(tmp_path):
    rows = [r for i, r in enumerate(text_trees()) if i not in (4, 8)]  # the first prompt has one
    pairs = tokenize_pairs(Dataset.from_list(rows), TOKENIZER, tiny_config(tmp_path))[0]
    numbers = PairRows(pairs, pair_weighting="prompt").numbers["weight"]
    by_prompt: dict[str, float] = {}
    for row, weight in zip(rows, numbers, strict=True):
        by_prompt[row["prompt"]] = by_prompt.get(row["prompt"], 0.0) + weight
    assert list(by_prompt.values()) == pytest.approx([2.5] * 4)
    assert PairRows(pairs, pair_weighting="prompt").trees is None


def test_margins_come_from_a_column_or_from_scores(tmp_path):
    rows = list(text_trees(2, 3))
    said = [
        r | {"margin": 0.5, "score_chosen": 3.0, "score_rejected": 1.0 + i}
        for i, r in enumerate(rows)
    ]
    for source, expected in (
        ("margin", [0.5] * 4),
        ("scores", [2.0, 1.0, 0.0, -1.0]),
        ("none", None),
    ):
        pairs, _ = tokenize_pairs(Dataset.from_list(said), TOKENIZER, tiny_config(tmp_path))
        margin = PairRows(pairs, margin_from=source).numbers.get("margin")
        assert (None if margin is None else margin.tolist()) == expected
    moved = weighted(tmp_path, Dataset.from_list(said))
    assert moved.state.log_history[0]["margin/mean"] == pytest.approx(1.5)
    with pytest.raises(UserError, match="margin_from: the rows of train_dataset have no columns"):
        weighted(tmp_path, Dataset.from_list(rows), margin_from="scores")
    with pytest.raises(UserError, match="orpo has no"):
        weighted(tmp_path, Dataset.from_list(said), objective="orpo")


def test_bad_weights_and_margins_are_rows_skipped_and_counted(tmp_path):
    values = [1.0, -1.0, float("nan"), None, 0.0]
    rows = [r | {"weight": w} for r, w in zip(text_trees(), values, strict=False)]
    pairs, report = tokenize_pairs(Dataset.from_list(rows), TOKENIZER, tiny_config(tmp_path))
    assert len(pairs) == 2
    assert report.skipped == {"a number that cannot be used": 3}
    assert "weight is -1.0, not a finite number of 0 or more" in "\n".join(report.lines())
    assert "weight: each pair's loss is multiplied by it" in "\n".join(report.lines())
