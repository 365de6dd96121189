"""A reference's log-probs that are computed once, kept on disk, or come with the data."""

from __future__ import annotations

import multiprocessing
import subprocess
import time

import numpy as np
import pytest
import torch
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.data.table import REFERENCE_COLUMNS
from widemargin.trainer.errors import UserError
from widemargin.trainer.model.digest import model_digest
from widemargin.trainer.reference import cache as reference_cache
from widemargin.trainer.reference import model as reference

from tests.support.reference_runs import (
    LORA,
    ONCE,
    dpo_trainer,
    losses,
    sums_by_hand,
    trained,
    with_columns,
)
from tests.support.tiny_models import (
    TOKENIZER,
    parameters_of,
    tiny_config,
    tiny_model,
    tiny_pairs,
    tiny_trainer,
)

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.costly
def test_precomputed_once_and_read_after(tmp_path, cache, monkeypatch):
    settings = {**ONCE, "eval_pairs": 5, "per_device_eval_batch_size": 3}
    plain = trained(tmp_path, eval_pairs=5)
    first = trained(tmp_path, **settings)
    assert first.reference.model is None
    assert losses(first) == pytest.approx(losses(plain), rel=1e-4)
    assert first.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr("widemargin.trainer.reference.model._summed_logps", None)
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


def test_precomputing_is_told_to_do_nothing_without_a_reference(tmp_path, caplog):
    dpo_trainer(tmp_path, objective="simpo", **ONCE)
    assert "precompute_ref_log_probs: does nothing here" in caplog.text


def test_workers_outlive_a_sigterm(tmp_path, monkeypatch):
    """As schedulers send it, to every process."""
    summed = reference._summed_logps
    killed = []

    def score(objective, model, batch):
        if not killed:
            killed.extend(multiprocessing.active_children())
            for child in killed:
                subprocess.run(["kill", str(child.pid)], check=True)
            time.sleep(0.3)
        return summed(objective, model, batch)

    monkeypatch.setattr(reference, "_summed_logps", score)
    trainer = dpo_trainer(tmp_path, **ONCE, per_device_eval_batch_size=2, dataloader_num_workers=1)
    assert len(killed) == 1
    assert "computed for 12 pairs" in trainer.reference.notes[0]


def test_computing_draws_no_random_numbers_of_the_training(tmp_path, monkeypatch):
    """Where they are read, training must draw the same dropout."""
    states = []
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: str(tmp_path))
    for folder in ("computed", "read"):
        dpo_trainer(tmp_path / folder, precompute_ref_log_probs=True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.costly
def test_sums_of_a_weighted_tail_are_computed_once_too(tmp_path, cache):
    tail = {"objective_args": {"ld_alpha": 0.3}}
    plain, live = trained(tmp_path), trained(tmp_path, **tail)
    assert losses(live) != pytest.approx(losses(plain), rel=1e-4)
    assert losses(trained(tmp_path, **tail, **ONCE)) == pytest.approx(losses(live), rel=1e-4)
    assert losses(trained(tmp_path, **ONCE)) == pytest.approx(losses(plain), rel=1e-4)
    assert len(list(cache.iterdir())) == 2


def test_columns_of_the_data_weigh_no_tail(tmp_path):
    settings = tiny_config(tmp_path, objective="dpo", objective_args={"ld_alpha": 0.3})
    rows = with_columns(REFERENCE_COLUMNS)
    with pytest.raises(UserError, match=r"ld_alpha 0\.3: leave it out, or take the columns"):
        PreferenceTrainer(tiny_model(), settings, rows, processing_class=TOKENIZER)
