"""The notebook and the scripts of examples/, on a tiny model."""

from __future__ import annotations

import importlib.util
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
@pytest.mark.usefixtures("preloaded")
def test_trl_script_trains_an_adapter(inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("trl_script.py", *inputs, str(out), cwd=tmp_path)
    assert (out / "adapter_model.safetensors").is_file()


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
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


@pytest.mark.costly
@pytest.mark.usefixtures("preloaded")
def test_demo_answers_the_same_questions_before_and_after(
    inputs: tuple[str, str], tmp_path: Path
) -> None:
    """On pairs of six prompts, of which the first five are the questions."""
    model, pairs = inputs
    places = [
        f"--model={model}",
        f"--train={pairs}",
        f"--test={pairs}",
        f"--out={tmp_path / 'out'}",
    ]
    short = ["--max_steps=2", "--eval_steps=1", "--eval_samples_max_new_tokens=3", "--use_cpu=true"]
    printed = run("demo.py", *places, *short, cwd=tmp_path)
    shown = printed[printed.index("before: ") :]
    assert shown.count("before: ") == shown.count("after: ") == 5
    assert shown.count("3 tokens, margin ") > 5
    assert (tmp_path / "out" / "run" / "adapter_model.safetensors").is_file()
    report = (tmp_path / "out" / "run" / "report.html").read_text(encoding="utf-8")
    assert report.count('class="card strip"') == 5


def test_demo_says_which_pairs_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    (tmp_path / "config.json").write_text("{}")
    absent = [f"--train={tmp_path / 'a.jsonl'}", f"--test={tmp_path / 'b.jsonl'}"]
    monkeypatch.setattr(sys, "argv", ["demo.py", f"--model={tmp_path}", *absent, "--beta=3"])
    options, overrides = demo.parse()
    assert overrides == ["--beta=3"]
    train, test = demo.pairs_of(options)
    assert len(train) > len(test) > 200
    assert (
        f"{tmp_path / 'a.jsonl'} and {tmp_path / 'b.jsonl'}: not there" in capsys.readouterr().out
    )
    (tmp_path / "config.json").unlink()
    with pytest.raises(SystemExit):
        demo.parse()
    assert "make real-model" in capsys.readouterr().err
