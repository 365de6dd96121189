"""Training on trees: the same pairs, the same losses, fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.data.table import PairRows

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
