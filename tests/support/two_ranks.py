"""Two processes on this machine, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from widemargin.trainer.cli import main

from tests.support.preloaded import python
from tests.support.tiny_models import TOKENIZER, tiny_model


def launch(
    folder: Path, *command: str, ranks: int = 2, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script or ``-m MODULE`` with its arguments on some ranks that work in ``folder``.

    torchrun takes a free port by itself, so any number of launches may run side by side. It and
    the ranks are forks of a preloaded process, or ``fresh`` ones. The ranks import from where this
    process does.
    """
    interpreter = sys.executable if fresh else python()
    launcher = [interpreter, "-m", "torch.distributed.run", "--standalone"]
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.run(
        [*launcher, f"--nproc_per_node={ranks}", *command],
        cwd=folder,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def trained_alike(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rows: Dataset, settings: str, **environment: str
) -> tuple[str, list[float]]:
    """Train by one process and by two, whose weights and losses must be equal.

    Args:
        folder: may have a model in ``model`` already.
        rows: of training.
        settings: of the run in YAML's flow style, without braces; 4 pairs are a micro-batch of all
            ranks.

    Returns:
        What the two printed, and the losses of the one, that of the whole run last.
    """
    if not (folder / "model").is_dir():
        tiny_model().save_pretrained(folder / "model")
        TOKENIZER.save_pretrained(folder / "model")
    rows.to_parquet(folder / "train.parquet")
    (folder / "config.yaml").write_text(
        "{model_name_or_path: ./model, dataset: train.parquet, beta: 0.5, optim: sgd, "
        "lr_scheduler_type: constant, max_grad_norm: 0.0, head_tail: exact, "
        "logging_first_step: true, logging_steps: 2, "
        f"save_strategy: 'no', use_cpu: true, disable_tqdm: true, write_report: false, {settings}}}"
    )
    monkeypatch.chdir(folder)
    alone = ["config.yaml", "--per_device_train_batch_size=4", "--output_dir=one"]
    assert main(["train", *alone]) == 0
    ranks = ["config.yaml", "--per_device_train_batch_size=2", "--output_dir=two"]
    module = ["-m", "widemargin.trainer", *ranks, "--ddp_backend=gloo"]
    done = launch(folder, *module, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    weights, logs = [], []
    for name in ("one", "two"):
        (saved,) = (folder / name).glob("*model.safetensors")
        weights.append(load_file(saved))
        state = json.loads((folder / name / "trainer_state.json").read_text())
        logs.append([e[k] for e in state["log_history"] for k in ("loss", "train_loss") if k in e])
    assert all((weights[0][k] - weights[1][k]).abs().max() < 2e-6 for k in weights[0])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    return done.stdout + done.stderr, logs[0]
