"""Which settings and contents make a run the same: refused, said or free."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from widemargin.trainer import PreferenceConfig
from widemargin.trainer.checkpoint import same_run
from widemargin.trainer.checkpoint.same_run import KINDS, compare
from widemargin.trainer.errors import UserError
from widemargin.trainer.loop.progress import follow_schedule

from tests.support.reference_runs import dpo_trainer
from tests.support.tiny_models import tiny_model, tiny_pairs

FACTS: dict[str, Any] = {
    "objective": {"name": "simpo"}, "model": {}, "couples_pairs": False, "pairs_per_step": 32,
    "micro_batches": 4, "pairs": 9, "tokens": "x", "engine": "none or DDP", "ranks": 2,
    "data_parallel_size": 2,
}  # fmt: skip
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "pairs": 8}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}


def test_every_setting_is_in_the_table_once():
    names = [field.name for field in dataclasses.fields(PreferenceConfig)]
    assert set(names) <= KINDS.keys()
    tables = (same_run.SAME, same_run.NOTED, same_run.CONTENT, same_run.FREE)
    counts = Counter(name for table in tables for name in table.split())
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", [*same_run.SAME.split(), "a setting of a later transformers"])
def test_what_may_not_change_is_refused(name):
    forbidden, notes = compare(FACTS | {"settings": {name: 1}}, FACTS | {"settings": {name: 2}})
    assert forbidden == [f"{name} was 1, is 2"]
    assert not notes


@pytest.mark.parametrize("name", same_run.NOTED.split())
def test_what_may_change_is_said(name):
    forbidden, notes = compare(FACTS | {"settings": {name: 1}}, FACTS | {"settings": {name: 2}})
    assert notes == [f"{name} was 1, is 2"]
    assert not forbidden


def test_ranks_and_packing_may_differ():
    now = FACTS | {"ranks": 4, "micro_batches": 2, "packing": "packed"}
    forbidden, notes = compare(FACTS, now)
    assert not forbidden
    assert len(notes) == 3
    split = {"engine": "DeepSpeed"}
    forbidden, _ = compare(FACTS | split, now | split)
    assert forbidden == ["ranks was 2, is 4, and DeepSpeed's files are split by rank"]
    forbidden, _ = compare(FACTS | {"weights_only": True}, now)
    assert "save_only_model" in forbidden[0]


@pytest.mark.parametrize("limits", [False, True])
def test_a_limit_that_would_raise_the_micro_batches_again_is_to_go(limits):
    coupled = FACTS | {"couples_pairs": True}
    now = coupled | {"micro_batches": 8, "limits_tokens": limits}
    (problem,), _ = compare(coupled, now)
    assert "set per_device_train_batch_size: 4, gradient_accumulation_steps: 4" in problem
    assert problem.endswith("and leave max_tokens_per_micro_batch out") == limits


def test_facts_say_whether_tokens_are_limited(tmp_path):
    for limit in (None, 80):
        trainer = dpo_trainer(tmp_path, max_tokens_per_micro_batch=limit, **SAVING)
        assert trainer._run_facts()["limits_tokens"] == (limit is not None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The checkpoint of a run with an adapter and a reference model."""
    folder = tmp_path_factory.mktemp("run")
    dpo_trainer(folder, ref_model=tiny_model(seed=5), **SAVING, **LORA).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": tiny_model(seed=3)}, "the base model has other weights"),
        ({"ref_model": tiny_model(seed=6)}, "the reference model has other weights"),
        ({"ref_model": None}, "the reference model has other weights"),
        ({"lora_r": 2}, "adapter r was 4, is 2"),
        ({"lora_alpha": 1}, "adapter lora_alpha was .*, is 1"),
        ({"lora_dropout": 0.5}, "adapter lora_dropout was 0.0, is 0.5"),
        ({"use_peft": False}, "adapter was there, is none"),
        ({"warmup_steps": 1, "max_grad_norm": 0.5}, "max_grad_norm was .*; warmup_steps was"),
        ({"model": tiny_model(rms_norm_eps=0.1)}, "model's config rms_norm_eps was"),
    ],
)
def test_another_run_is_refused_by_its_content(run, tmp_path, changes, reason):
    settings = {"ref_model": tiny_model(seed=5), **SAVING, **LORA} | changes
    if not settings["use_peft"]:
        settings = {k: v for k, v in settings.items() if not k.startswith("lora_")}
    with pytest.raises(UserError, match=reason):
        dpo_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(run))


def test_the_same_run_under_other_names_goes_on(run, tmp_path, caplog):
    """Content decides, not the names of files; a longer run is said."""
    settings = SAVING | LORA | {"max_steps": 3, "run_name": "x", "logging_steps": 2}
    trainer = dpo_trainer(tmp_path, ref_model=tiny_model(seed=5), **settings)
    assert trainer.train(resume_from_checkpoint=str(run)).global_step == 3
    assert "max_steps was 2, is 3" in caplog.text


def test_a_longer_run_goes_on_with_its_own_learning_rate(tmp_path):
    """The checkpoint of a finished run has the rate 0, with which a step would do nothing."""
    settings = SAVING | {"logging_steps": 1, "lr_scheduler_type": "linear"}
    dpo_trainer(tmp_path, **settings).train()
    trainer = dpo_trainer(tmp_path, **settings | {"max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates[2:] == pytest.approx([share * trainer.args.learning_rate for share in (0.5, 0.25)])


def test_a_schedule_of_another_kind_keeps_the_rate_of_its_checkpoint():
    """Adafactor's is a subclass of LambdaLR, whose functions say nothing of its rates."""

    class Own(LambdaLR):
        def get_lr(self) -> list[Any]:
            return [0.25]

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    follow_schedule(Own(optimizer, lambda _: 0.0))
    assert optimizer.param_groups[0]["lr"] == 0.25
    follow_schedule(LambdaLR(optimizer, lambda step: 0.5 + step))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_copy_of_the_start_is_a_reference_too(tmp_path):
    """Whether computed before training or with it; another start is another reference."""
    dpo_trainer(tmp_path, **SAVING).train()
    settings = SAVING | {"max_steps": 3, "precompute_ref_log_probs": True}
    trainer = dpo_trainer(tmp_path, **settings)
    assert trainer.train(resume_from_checkpoint=True).global_step == 3
    with pytest.raises(UserError, match="the reference model has other weights"):
        dpo_trainer(tmp_path, model=tiny_model(seed=3), **SAVING).train(resume_from_checkpoint=True)


def test_columns_of_the_data_set_are_a_reference_too(tmp_path):
    from widemargin.trainer import PreferenceTrainer
    from widemargin.trainer.data import tokenize_pairs

    from tests.support.tiny_models import TOKENIZER, tiny_config

    def trainer(value: float) -> PreferenceTrainer:
        rows, _ = tokenize_pairs(tiny_pairs(8), TOKENIZER)
        for name in ("reference_chosen_logps", "reference_rejected_logps"):
            rows = rows.add_column(name, [value] * len(rows))
        settings = {name: value for name, value in SAVING.items() if name != "pairs"}
        config = tiny_config(tmp_path, objective="dpo", **settings)
        return PreferenceTrainer(tiny_model(), config, rows, processing_class=TOKENIZER)

    trainer(-3.0).train()
    with pytest.raises(UserError, match="the reference model has other weights"):
        trainer(-4.0).train(resume_from_checkpoint=True)


def test_ranks_that_would_meet_in_other_steps_are_refused(monkeypatch):
    """They would wait for each other until ddp_timeout."""
    paced = dict.fromkeys(same_run.PACE.split(), 1)
    assert set(paced) <= set(same_run.FREE.split())
    facts: list[dict[str, Any]] = []

    def gather(everyone: list, mine: dict) -> None:
        facts.append(mine)
        everyone[:] = [facts[0], mine]

    def agree(held_out: Any, **changes: int) -> None:
        args: Any = SimpleNamespace(world_size=2, **paced | changes)
        unread: Any = None
        same_run.agreed_facts(args, unread, unread, held_out)

    monkeypatch.setattr(same_run, "_facts_of_a_rank", lambda *_: {"settings": {"seed": 1}})
    monkeypatch.setattr(same_run, "tokens_digest", str)
    monkeypatch.setattr(same_run, "PairRows", str)
    monkeypatch.setattr(same_run.dist, "all_gather_object", gather)
    agree("rows")
    agree("rows")
    with pytest.raises(UserError, match=r"rank 0 to rank 1: eval_steps was 1, is 5$"):
        agree("rows", eval_steps=5)
    for held_out in ("others", None, {"a": "rows"}):
        with pytest.raises(UserError, match=r"rank 0 to rank 1: other tokens of evaluation$"):
            agree(held_out)
    facts.clear()
    agree(Dataset.from_list([{"prompt": "raw"}]))  # assigned after the trainer was made
