"""What holds for every test: none uses the network.

A worker of a parallel run has one thread, and a cache of its own. Where there is no CUDA device,
tests marked `gpu` are skipped and Triton kernels interpreted.
"""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path

import pytest
import torch

# One thread for each worker of a parallel run, and for what it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Prepared data of this session alone, gone when it ends. datasets reads this when imported.
_CACHE = tempfile.TemporaryDirectory(prefix="widemargin-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

# A name that no folder has would be looked up on the hub: without a network, with long retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Triton reads this when it is imported, which torch and transformers put off: so before any test
# module. Compile tests run in processes of their own, without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

NOT_QUICK = {"costly", "distributed", "slow"}
"""Marks of the tests that `make test-quick` leaves out."""
_QUICK_FILES = pytest.StashKey[dict[Path, bool]]()


@pytest.hookimpl(tryfirst=True)  # before -m takes items away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick_files = config.stash[_QUICK_FILES] = {}
    for item in items:
        is_quick = not NOT_QUICK & {mark.name for mark in item.iter_markers()}
        quick_files[item.path] = quick_files.get(item.path, False) or is_quick
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Take what imports have made, which is most objects, out of the gc.collect() of trainings."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def quick_files(pytestconfig: pytest.Config) -> dict[Path, bool]:
    """The test files of this session, and whether `make test-quick` runs a test of each."""
    return pytestconfig.stash[_QUICK_FILES]


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python processes that the test starts or spawns are forks of one that has imported all."""
    from tests.support.preloaded import python

    monkeypatch.setattr(sys, "executable", python())
    before = spawn.get_executable()
    spawn.set_executable(sys.executable)
    yield
    spawn.set_executable(before)


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
