"""The frozen model: where its log-probs come from, that they stay, and the cache of them."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_config,
    tiny_model,
    tiny_pairs,
    tiny_trainer,
)
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM
from widemargin.kernels import reference as definitions
from widemargin.trainer import PreferenceTrainer, reference_cache
from widemargin.trainer.cli import main
from widemargin.trainer.data import tokenize_pairs
from widemargin.trainer.errors import UserError
from widemargin.trainer.reference_cache import model_digest
from widemargin.trainer.sampler import REFERENCE_COLUMNS

LORA = {"use_peft": True, "lora_dropout": 0.0, "learning_rate": 0.5}
ONCE = {"precompute_ref_log_probs": True}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A folder of its own for the log-probs kept on disk."""
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: str(tmp_path / "cache"))
    return tmp_path / "cache"


def dpo_trainer(folder, model=None, ref_model=None, peft_config=None, **settings):
    """A short DPO run over `tiny_pairs`."""
    count, held_out = settings.pop("pairs", 12), settings.pop("eval_pairs", 0)
    return PreferenceTrainer(
        model or tiny_model(),
        tiny_config(folder, **{"objective": "dpo", "beta": 0.5} | settings),
        train_dataset=tiny_pairs(count),
        eval_dataset=tiny_pairs(held_out, seed=1) if held_out else None,
        processing_class=TOKENIZER,
        ref_model=ref_model,
        peft_config=peft_config,
    )


def trained(folder, **settings):
    trainer = dpo_trainer(folder, **settings)
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sums_by_hand(model, row) -> list[torch.Tensor]:
    """Summed log-probs of one row's completions, with full logits."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([*row["prompt_ids"], *row[side]])
        n = len(row[side])
        hidden = model.model(ids[None]).last_hidden_state[0, -n - 1 : -1]
        sums.append(definitions.linear_logprob(hidden, model.lm_head.weight, ids[-n:]).sum())
    return sums


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


def test_precomputed_once_and_read_after(tmp_path, cache, monkeypatch):
    settings = {**ONCE, "eval_pairs": 5, "per_device_eval_batch_size": 3}
    plain = trained(tmp_path, eval_pairs=5)
    first = trained(tmp_path, **settings)
    assert first.reference.model is None
    assert losses(first) == pytest.approx(losses(plain), rel=1e-4)
    assert first.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr("widemargin.trainer.reference._summed_logps", None)
    second = trained(tmp_path, **settings)
    assert torch.equal(parameters_of(first.model), parameters_of(second.model))
    for name in REFERENCE_COLUMNS:
        kept = [[t.train_dataset[i][name] for i in range(12)] for t in (first, second)]
        assert kept[0] == kept[1]
        assert len(set(kept[0])) > 1
    assert len(list(cache.iterdir())) == 2
    assert "read for 12 pairs" in second.reference.notes[0]


def test_precomputed_log_probs_are_the_models_own(tmp_path):
    rows = dpo_trainer(tmp_path, **ONCE, pairs=5, per_device_eval_batch_size=2).train_dataset
    for row in (rows[i] for i in range(5)):
        expected = [s.item() for s in sums_by_hand(tiny_model(), row)]
        assert [row[name] for name in REFERENCE_COLUMNS] == pytest.approx(expected, rel=1e-5)


CHANGES = [
    pytest.param({"model": lambda: tiny_model(seed=1)}, 2, id="weights"),
    pytest.param({"model": lambda: tiny_model(rms_norm_eps=1e-3)}, 2, id="config"),
    pytest.param({"max_length": 12}, 2, id="limit"),
    pytest.param({"pairs": 11}, 2, id="rows"),
    pytest.param({"bf16": True}, 2, id="precision"),
    pytest.param({"tokenizer": True}, 2, id="tokens"),
    pytest.param({"beta": 0.1, "learning_rate": 0.1, "seed": 3}, 1, id="nothing of it"),
    pytest.param({"per_device_eval_batch_size": 5}, 1, id="batch"),
    pytest.param(LORA, 1, id="adapter"),
]


@pytest.mark.parametrize(("changes", "files"), CHANGES)
def test_what_makes_it_compute_again(tmp_path, cache, changes, files):
    dpo_trainer(tmp_path, **ONCE)
    changes = dict(changes)
    if "model" in changes:
        changes["model"] = changes["model"]()
    if changes.pop("tokenizer", False):
        rows = tiny_pairs()
        changed = rows.map(lambda row: {"prompt": row["prompt"].replace("User", "user")})
        settings = tiny_config(tmp_path, objective="dpo", **ONCE)
        PreferenceTrainer(tiny_model(), settings, changed, processing_class=TOKENIZER)
    else:
        dpo_trainer(tmp_path, **ONCE, **changes)
    assert len(list(cache.iterdir())) == files


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "another's"])
def test_a_damaged_file_is_noticed_and_made_again(tmp_path, cache, caplog, damage):
    dpo_trainer(tmp_path, **ONCE)
    (path,) = cache.iterdir()
    whole, values = path.read_bytes(), reference_cache.read(path, 12)
    if damage == "truncated":
        path.write_bytes(whole[:-7])
    elif damage == "flipped":
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:])
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        dpo_trainer(tmp_path, **ONCE, pairs=11)
        (other,) = set(cache.iterdir()) - {path}
        other.replace(path)
    dpo_trainer(tmp_path, **ONCE)
    complaints = [r for r in caplog.records if "again" in r.getMessage()]
    assert len(complaints) == 1
    assert str(path) in complaints[0].getMessage()
    again = reference_cache.read(path, 12)
    assert all(np.array_equal(values[name], again[name]) for name in REFERENCE_COLUMNS)
    assert list(cache.iterdir()) == [path]


def test_digest_of_a_model():
    digest = model_digest(tiny_model())
    assert digest == model_digest(tiny_model())
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    renamed = tiny_model(hidden_act="relu")
    assert len({digest, model_digest(changed), model_digest(renamed)}) == 3
    assert model_digest(tiny_model().bfloat16()) != digest


def with_columns(names, shift=0.0) -> Dataset:
    pairs, _ = tokenize_pairs(tiny_pairs(), TOKENIZER, tiny_config(Path("unused")))
    model = tiny_model()
    with torch.no_grad():
        sums = np.array([[s.item() for s in sums_by_hand(model, row)] for row in pairs]) + shift
    for name, column in zip(names, sums.T, strict=True):
        pairs = pairs.add_column(name, column)
    return pairs


@pytest.mark.parametrize("names", [REFERENCE_COLUMNS, ("ref_chosen_logps", "ref_rejected_logps")])
def test_columns_that_the_data_has_need_no_model(tmp_path, names):
    settings = tiny_config(tmp_path, objective="dpo", beta=0.5)
    trainer = PreferenceTrainer(
        tiny_model(), settings, with_columns(names), processing_class=TOKENIZER
    )
    trainer.train()
    assert trainer.reference.model is None
    assert losses(trainer) == pytest.approx(losses(trained(tmp_path)), rel=1e-4)
    with pytest.raises(UserError, match="no reference log-probs"):
        trainer.evaluate(tiny_trainer(tmp_path, eval_pairs=3).eval_dataset)


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


def test_precomputing_is_told_to_do_nothing_without_a_reference(tmp_path, caplog):
    dpo_trainer(tmp_path, objective="simpo", **ONCE)
    assert "simpo has no reference" in caplog.text


SPLIT = {
    "precomputed": "precompute_ref_log_probs: true, learning_rate: 0.05",
    "adapter": "use_peft: true, lora_dropout: 0, learning_rate: 0.5",
}


@pytest.mark.parametrize("how", SPLIT)
def test_two_ranks_equal_one(tmp_path, cache, monkeypatch, how):
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_pairs(11).to_json(tmp_path / "train.jsonl")
    (tmp_path / "config.yaml").write_text(
        "{model_name_or_path: ./model, dataset: train.jsonl, objective: dpo, beta: 0.5, "
        "optim: sgd, lr_scheduler_type: constant, max_grad_norm: 0.0, head_tail: exact, "
        "max_steps: 5, logging_steps: 1, save_strategy: 'no', use_cpu: true, disable_tqdm: true, "
        f"write_report: false, {SPLIT[how]}}}"
    )
    monkeypatch.chdir(tmp_path)
    alone = ["config.yaml", "--per_device_train_batch_size=4", "--output_dir=one"]
    assert main(["train", *alone]) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ranks = ["config.yaml", "--per_device_train_batch_size=2", "--output_dir=two"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "widemargin.trainer", *ranks, "--ddp_backend=gloo"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "its own reference" not in done.stdout + done.stderr
    weights, logs = [], []
    for name in ("one", "two"):
        (saved,) = (tmp_path / name).glob("*model.safetensors")
        weights.append(load_file(saved))
        state = json.loads((tmp_path / name / "trainer_state.json").read_text())
        logs.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert all((weights[0][k] - weights[1][k]).abs().max() < 2e-6 for k in weights[0])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert logs[0][0] == pytest.approx(math.log(2), rel=1e-4)
    if how == "precomputed":
        (kept,) = (tmp_path / "datasets" / "widemargin").glob("reference-*")
        assert [kept.name] == [path.name for path in cache.iterdir()]


def test_logging_is_on():
    """Else the tests above that nothing was warned of would prove nothing."""
    assert logging.getLogger("widemargin.trainer.reference").isEnabledFor(logging.WARNING)
