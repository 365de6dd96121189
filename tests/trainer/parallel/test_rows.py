"""Rows that several ranks share give what one process gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from widemargin.trainer.parallel.groups import Place
from widemargin.trainer.parallel.rows import SharedRow

from tests.support.shared_row_ranks import LAYOUTS, MODELS, OBJECTIVES
from tests.support.two_ranks import launch


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_ranks_have_every_token_once(tokens, size):
    row = torch.arange(1, tokens + 1)[None]
    ranks = [SharedRow(Place(rank, size), tokens) for rank in range(size)]
    parts = [rank.own(row) for rank in ranks]
    assert {part.shape for part in parts} == {(1, -(-tokens // size))}
    together = torch.stack(parts, dim=2).flatten(1)
    assert torch.equal(together[:, :tokens], row)
    assert not together[:, tokens:].any()
    for rank, part in zip(ranks, parts, strict=True):
        positions = torch.arange(tokens)[rank.place.rank :: size]
        assert torch.equal(part[0, rank.own_places(positions)], row[0, positions])


def test_ranks_have_every_target_once():
    select = np.random.default_rng(0).integers(0, 50, 31)
    shares = [Place(rank, 3).own_targets(select) for rank in range(3)]
    assert sorted(np.concatenate(shares)) == list(range(31))
    assert all((select[share] % 3 == rank).all() for rank, share in enumerate(shares))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found, see `shared_row_ranks`."""
    folder = tmp_path_factory.mktemp("ranks")
    command = ["-m", "tests.support.shared_row_ranks", "models", str(folder)]
    done = launch(folder, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.costly
@pytest.mark.parametrize(
    "batch", [*(f"{a} {b}" for a in LAYOUTS for b in OBJECTIVES), "short simpo"]
)
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_equal_one_process(ranks, model, batch):
    for found in ranks:
        loss, gradient = found["errors"][f"{model} {batch}"]
        assert loss < 1e-6
        assert gradient < 5e-6


@pytest.mark.costly
def test_rows_are_filled_up_and_a_rank_may_have_no_target(ranks):
    assert {tokens % 2 for tokens in ranks[0]["tokens"].values()} == {0, 1}
    assert sorted(found["targets"] for found in ranks) == [0, 2]
