"""The notebook and the scripts of examples/, on a tiny model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.support.tiny_models import TOKENIZER, tiny_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "lmpo_smollm2.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    """A model's folder and a file of pairs."""
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    tiny_model().save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    words = ["yes", "no", "maybe", "water", "Paris", "sure"]
    rows = [
        {
            "prompt": [{"role": "user", "content": words[i % 6]}],
            "chosen": [{"role": "assistant", "content": " ".join(words[: 1 + i % 3])}],
            "rejected": [{"role": "assistant", "content": " ".join(words[i % 4 :])}],
        }
        for i in range(16)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(model), str(pairs)


def run(script: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.costly
def test_trl_script_trains_an_adapter(inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("trl_script.py", *inputs, str(out), cwd=tmp_path)
    assert (out / "adapter_model.safetensors").is_file()


@pytest.mark.costly
def test_own_loop_takes_steps(inputs: tuple[str, str], tmp_path: Path) -> None:
    printed = run("own_loop.py", *inputs, cwd=tmp_path)
    losses = [float(line.split()[1]) for line in printed.splitlines() if line.startswith("loss ")]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.costly
def test_notebook_runs(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "notebook"}
    exec(CODE[0], space)
    space |= {"MODEL": inputs[0], "PAIRS": inputs[1], "OUT": str(tmp_path / "out")}
    space |= {"STEPS": 3, "PAIRS_A_STEP": 2, "MAX_LENGTH": 64, "ANSWER_TOKENS": 4}
    for cell in CODE[1:]:
        exec(cell, space)
    assert space["status"] == 0
    assert len(space["before"]) == len(space["after"]) == 3
    steps = [row["step"] for row in space["history"] if "logps/chosen" in row]
    assert steps == [1, 2, 3]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged") is not None


def test_notebook_is_committed_without_outputs() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("script", ["trl_script.py", "own_loop.py"])
def test_scripts_stay_short(script: str) -> None:
    lines = (EXAMPLES / script).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
