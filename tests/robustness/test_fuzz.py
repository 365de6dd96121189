"""Hostile input: hundreds of strange rows and settings end in a batch or in one of our errors.

``FUZZ_CASES`` sets how many (`make torture` tries 50,000).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import config as datasets_config

from tests.support.fuzzing import run_case, search

COUNT = int(os.environ.get("FUZZ_CASES", "600"))


@pytest.mark.costly
def test_every_case_runs_or_ends_in_our_error(tmp_path_factory, monkeypatch):
    folder = Path(tmp_path_factory.mktemp("fuzz"))
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "cache")
    outcomes = search(COUNT, int(os.environ.get("FUZZ_SEED", "0")), folder)
    print(outcomes)
    if COUNT >= 500:
        assert all(outcomes[name] > COUNT / 50 for name in ("settings", "data", "ran")), outcomes


ROWS = [{"prompt": "yes", "chosen": "no, water", "rejected": "Paris is far"}]


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        pytest.param({"trackio_static_space_id": []}, "settings", id="a list for a literal"),
        pytest.param({"trackio_static_space_id": False}, "ran", id="a literal"),
        pytest.param({"hub_private_repo": True}, "ran", id="sound"),
    ],
)
def test_what_was_found(settings, outcome, tmp_path):
    """Cases that once ended in a library's exception, and their sound neighbours."""
    assert run_case((ROWS, settings, "plain", "simpo"), tmp_path) == outcome
