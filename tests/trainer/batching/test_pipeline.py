"""Rows and their lengths from Arrow, and one rank's batches of a plan."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.batching.pipeline import PairBatches
from widemargin.trainer.batching.planner import Planner
from widemargin.trainer.data.table import FILLER_ID, PairLengths, PairRows

from tests.support.tiny_models import tiny_config, tiny_model, tiny_pairs
from tests.support.tiny_tokenizers import tiny_tokenizer

PARTS = ("prompt", "chosen", "rejected")


def token_rows(count: int, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    rows = [
        {f"{part}_ids": rng.integers(1, 99, rng.integers(1, 9)).tolist() for part in PARTS}
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def batches_of(pairs: int, size: int, micro_batches: int, ranks: int, **options) -> list:
    lengths = PairLengths(*np.random.default_rng(0).integers(1, 50, (3, pairs)))
    planner = Planner(lengths, size, micro_batches, ranks, seed=3, **options)
    return [list(PairBatches(planner, rank)) for rank in range(ranks)]


@pytest.mark.parametrize(("pairs", "per_rank"), [(24, 2), (25, 2), (3, 4), (1, 1), (17, 3)])
def test_ranks_share_the_same_global_micro_batches(pairs, per_rank):
    """Any number of ranks sees the same pairs together, in the same order, each exactly once."""
    together = {}
    for ranks in (1, 2, 3, 12):
        batches = batches_of(pairs, 12 * per_rank, 1, ranks)
        assert len({len(b) for b in batches}) == 1
        together[ranks] = [
            sorted(i for rank in step for i in rank if i >= 0)
            for step in zip(*batches, strict=True)
        ]
        assert sorted(i for step in together[ranks] for i in step) == list(range(pairs))
        assert all(rank for step in zip(*batches, strict=True) for rank in step)
    assert len({json.dumps(steps) for steps in together.values()}) == 1


def test_a_rank_without_a_pair_gets_the_shortest_as_filler():
    lengths = PairLengths(*np.array([[9, 2], [9, 2], [9, 2]]))
    planner = Planner(lengths, 3, 1, ranks=3, seed=None)
    shares = [next(iter(PairBatches(planner, rank))) for rank in range(3)]
    assert sorted(shares) == [[FILLER_ID - 1], [0], [1]]


def test_epochs_differ_and_repeat():
    lengths = PairLengths(*np.ones((3, 20), np.int64))
    sampler = PairBatches(Planner(lengths, 4, 1, seed=1))
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second


@pytest.mark.parametrize("coupled", [True, False])
def test_most_pairs_of_a_rank(coupled):
    lengths = PairLengths(*np.random.default_rng(0).integers(1, 50, (3, 50)))
    samplers = [PairBatches(Planner(lengths, 12, 2, 2, coupled=coupled), r) for r in range(2)]
    largest = max(len(batch) for sampler in samplers for batch in sampler)
    assert [sampler.max_pairs_per_rank for sampler in samplers] == [largest] * 2


def rearranged() -> dict[str, Dataset]:
    rows = token_rows(30)
    two = concatenate_datasets([rows, token_rows(7, seed=1)])
    return {
        "as stored": rows,
        "shuffled": rows.shuffle(seed=1),
        "selected": rows.select([5, 3, 3, 29]),
        "a range": rows.select(range(4, 20)),
        "a range of shuffled": rows.shuffle(seed=1).select(range(4, 20)),
        "joined": two,
        "joined and shuffled": two.shuffle(seed=2),
        "joined, shuffled apart": concatenate_datasets([rows.shuffle(seed=3), two]),
        "other columns": two.add_column("pair_id", range(37)).shuffle(seed=4),
        "formatted": rows.shuffle(seed=1).with_format("torch"),
    }


@pytest.mark.parametrize("name", rearranged())
def test_lengths_and_rows_of_a_rearranged_data_set(name):
    dataset = rearranged()[name]
    rows = PairRows(dataset)
    plain = dataset.with_format(None)
    for part in PARTS:
        ids = plain[f"{part}_ids"]
        lengths = getattr(rows.lengths, part)
        assert lengths.tolist() == [len(row) for row in ids]
        assert lengths.dtype == np.int64
        assert [row[f"{part}_ids"].tolist() for row in rows] == list(ids)


def test_rows_in_any_order_fillers_included():
    rows = PairRows(token_rows(5))
    first, filler, again = rows.__getitems__([4, FILLER_ID - 2, 4])
    assert first["pair_id"] == again["pair_id"] == 4
    assert first["chosen_ids"].tolist() == again["chosen_ids"].tolist()
    assert filler["pair_id"] == FILLER_ID
    assert filler["prompt_ids"].tolist() == rows[2]["prompt_ids"].tolist()


def test_reference_columns_travel_along_in_full_precision():
    rows = token_rows(3).add_column("reference_chosen_logps", [-1.0, -2.0, -1 / 3])
    assert "reference_chosen_logps" not in PairRows(rows)[0]  # the other one is missing
    rows = rows.add_column("reference_rejected_logps", [-4.0, -5.0, -6.0])
    row = PairRows(rows.select([2, 0]))[0]
    assert row["reference_chosen_logps"] == -1 / 3
    assert row["reference_rejected_logps"] == -6.0


def test_what_becomes_of_a_trainers_rows_is_said(tmp_path, caplog):
    rows: list[Any] = list(tiny_pairs(4))

    def made() -> str:
        data = Dataset.from_list(rows)
        config, tokenizer = tiny_config(tmp_path), tiny_tokenizer(None)
        PreferenceTrainer(tiny_model(), config, train_dataset=data, processing_class=tokenizer)
        return caplog.text

    assert "pairs of" not in made()
    rows[1]["chosen"] = rows[1]["rejected"]
    assert "train: 3 pairs of 4 rows, 1 skipped" in made()
    assert "row 1 of train_dataset: identical sides" in caplog.text
