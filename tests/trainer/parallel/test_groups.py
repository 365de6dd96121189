"""Runs of 2 groups of 2 ranks that share rows, against one process: weights, logs and margins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.shared_row_ranks import RUNS, run
from tests.support.tiny_models import parameters_of, tiny_model
from tests.support.two_ranks import launch

OF_A_LAUNCH = ("_per_s", "per_second", "runtime", "memory", "flos", "head/", "vs_padded")
"""Parts of the names of figures that differ between launches."""

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one process and four left of each run."""
    folder = tmp_path_factory.mktemp("runs")
    for name in RUNS:
        run(name, folder / f"1-{name}", 1)
    command = ["-m", "tests.support.shared_row_ranks", "runs", str(folder)]
    done = launch(folder, *command, ranks=4, HF_DATASETS_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def figures(path: Path) -> list[dict[str, Any]]:
    log = json.loads((path / "log.json").read_text())
    return [
        {key: value for key, value in entry.items() if not any(n in key for n in OF_A_LAUNCH)}
        for entry in log
    ]


@pytest.mark.parametrize("name", RUNS)
def test_weights_equal_those_of_one_process(folder, name):
    one, four = (load_file(folder / f"{ranks}-{name}" / "weights") for ranks in (1, 4))
    assert one.keys() == four.keys()
    assert max((one[key] - four[key]).abs().max().item() for key in one) < 2e-6
    after = torch.cat([value.flatten() for value in four.values()])
    if "use_peft" in RUNS[name]:
        assert max(v.abs().max().item() for k, v in four.items() if "lora_B" in k) > 1e-2
    else:
        assert (after - parameters_of(tiny_model())).abs().max() > 1e-2


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_counts_pairs_once(folder, name):
    one, four = (figures(folder / f"{ranks}-{name}") for ranks in (1, 4))
    assert len(one) > 4
    flops = [json.loads((folder / f"{n}-{name}/log.json").read_text())[-1] for n in (1, 4)]
    assert flops[1]["total_flos"] == pytest.approx(flops[0]["total_flos"], rel=0.3)  # a filler
    for expected, found in zip(one, four, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_an_evaluation_has_each_pair_once(folder):
    log = figures(folder / "4-lmpo")
    assert [entry["eval_rows"] for entry in log if "eval_rows" in entry] == [5.0, 5.0]
    files = [folder / f"{ranks}-lmpo" / "margins.jsonl" for ranks in (1, 4)]
    assert files[0].read_text() == files[1].read_text()


def test_a_checkpoint_counts_tokens_once(folder):
    one, four = (
        json.loads((folder / f"{ranks}-lmpo/checkpoint-4/manifest.json").read_text())["run"]
        for ranks in (1, 4)
    )
    assert four["progress"]["num_tokens"] == one["progress"]["num_tokens"]
    assert four["pairs_per_step"] == one["pairs_per_step"] == 4
    assert (four["ranks"], four["data_parallel_size"]) == (4, 2)


def test_one_process_goes_on_from_a_checkpoint_of_four(folder, caplog):
    run("lmpo", folder / "4-lmpo", 1, resume=str(folder / "4-lmpo" / "checkpoint-2"))
    one, resumed = (load_file(folder / f"{ranks}-lmpo" / "weights") for ranks in (1, 4))
    assert max((one[key] - resumed[key]).abs().max().item() for key in one) < 2e-6
    assert "sequence_parallel_size was 2, is 1" in caplog.text
