"""The head whose vocabulary is split over ranks: two processes against one."""

from __future__ import annotations

import json
import re

import pytest
import torch
from widemargin.kernels.vocab_parallel import vocab_parallel_linear_logprob

from tests.support.two_ranks import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found, see `vocab_ranks`."""
    folder = tmp_path_factory.mktemp("ranks")
    done = launch(folder, "-m", "tests.support.vocab_ranks", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.costly
def test_two_ranks_equal_one(ranks):
    """Log-probs, dH, dW and db in fp32, with every option, tail and cut, in torch and Triton."""
    for found in ranks:
        assert len(found["equal"]) == (41 if torch.cuda.is_available() else 44)
        worst = {name: max(errors.values()) for name, errors in found["equal"].items()}
        assert {name: error for name, error in worst.items() if error > 1e-6} == {}
        assert max(found["exact"]) < 1e-12
        assert max(found["defined"].values()) < 1e-6


@pytest.mark.costly
def test_frozen_bad_and_missing_inputs(ranks):
    for found in ranks:
        assert {name for name, held in found["holds"].items() if not held} == set()


@pytest.mark.costly
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("outside", r"targets: expected ids in \[0, 300\) or -100, got 300"),
        ("overlap", "vocab_start: expected 170 on rank 1, as many as .* hold, or None, got 160"),
        ("gap", "vocab_start: expected 170 on rank 1, .*, got 180"),
        ("start", "vocab_start: expected this rank's first row, or None, got -1"),
        ("others", "targets: expected the same on all ranks, got others on some rank"),
        ("twice", "NotImplementedError: .* no second derivative"),
    ],
)
def test_every_rank_refuses(ranks, what, said):
    for found in ranks:
        assert re.search(said, found["refused"][what])


@pytest.mark.costly
def test_a_rank_outside_the_group(ranks):
    assert "group: expected one with this rank in it" in ranks[1]["refused"]["group"]


def test_needs_a_process_group():
    hidden, weight, targets = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"group: .* call torch\.distributed\.init_process_group"):
        vocab_parallel_linear_logprob(hidden, weight, targets, group=None)
