"""One thread in a parallel run; without a CUDA device, `gpu` is skipped and Triton interpreted."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# One worker a core, so one thread a worker and in what it starts. torch reads this when imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton reads this when it is imported, which torch and transformers put off: so before any test
# module. Compile tests run in processes of their own, without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of the module's own for tokenized pairs."""
    from datasets import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for a reference's log-probs."""
    from widemargin.trainer.reference import cache as reference_cache

    monkeypatch.setattr(reference_cache, "cache_folder", lambda: str(tmp_path / "cache"))
    return tmp_path / "cache"
