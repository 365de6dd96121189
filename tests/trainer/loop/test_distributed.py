"""Two processes under DDP, ZeRO-2, ZeRO-3 and FSDP2 end where one process does.

One launch per engine, through the configs that are shipped, does all of `distributed_runs.RUNS`.
DDP's processes are fresh, the others are forks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from widemargin.trainer.errors import UserError

from tests.support.distributed_runs import (
    OFFLOADED,
    PAIRS,
    RESUMED,
    RUNS,
    SPOILT_STEP,
    run,
    write_inputs,
)
from tests.support.preloaded import python
from tests.support.tiny_models import TOKENIZER

ROOT = Path(__file__).resolve().parents[3]
ENGINES = ("multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
}

pytestmark = pytest.mark.distributed


class Engine(NamedTuple):
    """What two processes under an engine left, and one process alone."""

    name: str
    output: Path
    alone: Path

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        return {name: RUNS[name] for name in (OFFLOADED if "offload" in self.name else RUNS)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """The models, and the runs of one process."""
    folder = tmp_path_factory.mktemp("distributed")
    write_inputs(folder)
    for name, settings in RUNS.items():
        run(settings, folder, folder / "alone" / name)
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, inputs) -> Engine:
    name = request.param
    if name.startswith("deepspeed") and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed; make test-distributed installs it")
    launch = ["-m", "accelerate.commands.launch", "--config_file"]
    launch += [f"configs/accelerate/{name}.yaml", "--num_processes=2", "--main_process_port=0"]
    cache = inputs / f"cache-{name}"
    interpreter = sys.executable if name == "multi_gpu" else python()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [interpreter, *launch, "-m", "tests.support.distributed_runs", name, str(inputs)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "HF_DATASETS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return Engine(name, inputs / name, inputs / "alone")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def farthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The greatest difference, where a tied head may or may not be written beside its embedding."""
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(a) ^ set(b) <= set(tied)
    worst = [(a[k if k in a else tied[k]] - v).abs().max() for k, v in b.items()]
    return torch.stack(worst).max().item()


def margins(folder: Path) -> list[dict[str, float]]:
    """Every step's margins by pair, all ranks' together."""
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("margins-*.json"))]
    return [{k: v for part in step for k, v in part.items()} for step in zip(*ranks, strict=True)]


def test_parameters_equal_those_of_one_process(engine):
    apart, moved = {}, {}
    for name, settings in engine.runs.items():
        after, alone = weights(engine.output / name), weights(engine.alone / name)
        apart[name] = farthest(after, alone)
        if "use_peft" in settings:
            moved[name] = max(v.abs().max().item() for k, v in after.items() if "lora_B" in k)
        else:
            moved[name] = farthest(after, weights(engine.alone.parent / settings["model"]))
    assert max(apart.values()) < 1e-5, apart
    assert min(moved.values()) > 1e-2, moved


def test_margins_and_losses_equal_those_of_one_process(engine):
    for name, settings in engine.runs.items():
        ours, alone = margins(engine.output / name), margins(engine.alone / name)
        sizes = Counter(map(len, alone))
        assert set(sizes) == {8, PAIRS[settings["model"]] % 8}, "a ragged last step"
        for ours_step, alone_step in zip(ours, alone, strict=True):
            assert ours_step == pytest.approx(alone_step, abs=2e-5), name
        if settings["objective"] in ("lmpo", "gamma-simpo"):
            assert len(set(alone[-1].values())) > 1
        losses = [
            json.loads((folder / name / "losses-0.json").read_text())
            for folder in (engine.output, engine.alone)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4), name


def test_the_saved_model_loads_in_plain_transformers(engine):
    """And its weights are those that trained, bit for bit."""
    start = torch.tensor([[TOKENIZER.bos_token_id, 5]])
    for name, settings in engine.runs.items():
        if "use_peft" in settings:
            continue
        folder = engine.output / name
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert model.generate(start, max_new_tokens=2, do_sample=False).shape[1] > 2
        loaded, saved = dict(model.named_parameters()), weights(folder)
        assert all(torch.equal(value, saved[key]) for key, value in loaded.items())
        if (folder / "in_training.safetensors").exists():
            trained = load_file(folder / "in_training.safetensors")
            assert trained.keys() == loaded.keys()
            assert all(torch.equal(value, trained[key]) for key, value in loaded.items())


def test_resumed_equals_uninterrupted(engine):
    if "offload" in engine.name:
        pytest.skip("the same files as without offloading")
    whole, resumed = weights(engine.output / "uninterrupted"), weights(engine.output / "resumed")
    assert farthest(resumed, whole) < 1e-6
    assert farthest(whole, weights(engine.alone.parent / "untied")) > 1e-4


def test_another_number_of_ranks_goes_on_or_is_refused(engine):
    """Two ranks' checkpoint, taken up by one process that has no engine."""
    if "offload" in engine.name:
        pytest.skip("the same files as without offloading")
    checkpoint = str(engine.output / "uninterrupted" / "checkpoint-2")
    folder = engine.output / "one-rank"
    if engine.name == "multi_gpu":
        run(RESUMED, engine.alone.parent, folder, checkpoint)
        assert farthest(weights(folder), weights(engine.output / "uninterrupted")) < 1e-6
    else:
        with pytest.raises(UserError, match=r"engine was (DeepSpeed|FSDP), is none or DDP"):
            run(RESUMED, engine.alone.parent, folder, checkpoint)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_the_update(engine, what):
    if "offload" in engine.name:
        pytest.skip("the same guards as without offloading")
    folder = engine.output / f"spoilt-{what}"
    message = (folder / "message.txt").read_text()
    assert f"Step {SPOILT_STEP}: " in message
    assert "nothing was updated" in message
    assert ("the loss is nan" if what == "loss" else "the gradient's norm") in message
    before, after = (load_file(folder / f"{name}.safetensors") for name in ("before", "after"))
    assert farthest(before, after) == 0


def test_references_were_computed_by_the_engine(engine):
    """Not read from what another left."""
    if "dpo-precomputed" not in engine.runs:
        pytest.skip("not among its runs")
    kept = engine.alone.parent / f"cache-{engine.name}" / "widemargin"
    precomputed = [run for run in engine.runs.values() if "precompute_ref_log_probs" in run]
    assert len(list(kept.glob("reference-*"))) == len(precomputed) == 2
