"""Code blocks of README and docs run, and the site builds without a warning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from widemargin.trainer.settings.files import load_config

from docs import prose
from docs.prose import sentences
from tests.support.doc_pages import PAGES, ROOT, fenced
from tests.support.pair_rows import bot, user
from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs

ELSEWHERE = "elsewhere.md"
"""Its blocks need other libraries' trainers; tests/integrations runs them."""

FILE = re.compile(r"# (\w+\.py)\b")
"""How a block begins that is a file of the reader's."""

PYTHON = [
    (page, i)
    for page in PAGES
    for i, (kind, text) in enumerate(fenced(page))
    if kind == "python" and page.name != ELSEWHERE and not FILE.match(text)
]
YAML = [(page, i) for page in PAGES for i, (kind, _) in enumerate(fenced(page)) if kind == "yaml"]
SHELL = [(page, text) for page in PAGES for kind, text in fenced(page) if kind == "bash"]


def named(value: Any) -> str:
    return value.name if isinstance(value, Path) else str(value)


def surroundings(folder: Path) -> dict[str, Any]:
    """The names that blocks take as given: a model, its tokenizer, pairs, tokens."""
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    TOKENIZER.save_pretrained(folder / "model")
    hidden = torch.randn(6, 16, requires_grad=True)
    input_ids = torch.arange(5, 17).reshape(2, 6)
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [9, 7]}
    return {
        "model": model,
        "tokenizer": TOKENIZER,
        "pairs": tiny_pairs(8),
        "rows": [ids, ids | {"prompt_ids": [4]}],
        "input_ids": input_ids,
        "mask": torch.ones_like(input_ids),
        "labels": input_ids.index_fill(1, torch.arange(3), -100),
        "hidden": hidden,
        "lm_head": torch.nn.Linear(16, 40, bias=False),
        "targets": torch.arange(6),
    }


def test_there_are_blocks_to_run():
    pages = {page.name for page, _ in PYTHON}
    assert {"README.md", "first-run.md", "kernel.md"} <= pages
    assert {page.name for page, _ in YAML} >= {"first-run.md", "objectives.md"}


@pytest.mark.costly
@pytest.mark.parametrize(("page", "place"), PYTHON, ids=named)
def test_python_runs(page: Path, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    space = surroundings(tmp_path)
    exec(fenced(page)[place][1], space)
    if "logps" in space:
        space["logps"].sum().backward()
        leaf = space["hidden"] if "linear_logprob" in space else next(space["model"].parameters())
        assert torch.isfinite(leaf.grad).all()
    if "args" in space:
        assert list((tmp_path / "outputs" / "my-run").iterdir())


@pytest.mark.costly
def test_an_objective_of_the_readers_trains(tmp_path: Path):
    for _, text in fenced(ROOT / "docs" / "objectives.md"):
        if name := FILE.match(text):
            (tmp_path / name[1]).write_text(text)
    tiny_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny_pairs(8).to_json(tmp_path / "pairs.jsonl")
    lines = ["model_name_or_path: model", "dataset: pairs.jsonl", "objective: mine", "beta: 3"]
    lines += ["max_steps: 2", "report_to: none", "output_dir: out"]
    (tmp_path / "my.yaml").write_text("\n".join(lines))
    command = [sys.executable, "run.py", "train", "my.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["summary"]["steps"] == 2


@pytest.mark.parametrize(("page", "place"), YAML, ids=named)
def test_yaml_is_a_configuration(page: Path, place: int, tmp_path: Path):
    """Whole files load; pieces, which name no model, load with one."""
    values = yaml.safe_load(fenced(page)[place][1])
    data = tmp_path / "pairs.jsonl"
    row = {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}
    data.write_text(json.dumps(row) + "\n")
    values |= {"model_name_or_path": str(tmp_path), "dataset": str(data)}
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump({"objective": "simpo"} | values))
    config = load_config(str(file), [])
    for name in ("beta", "learning_rate", "output_dir", "model_name_or_path"):
        if name in values:
            assert getattr(config, name) == type(getattr(config, name))(values[name])


@pytest.mark.parametrize(("page", "text"), SHELL, ids=named)
def test_shell_is_well_formed(page: Path, text: str):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_readme_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 120
    header = next(line for line in readme.splitlines() if line.startswith("| training step |"))
    assert header.count("|") <= 6


def test_every_page_is_in_the_navigation_once():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in ROOT.glob("docs/*.md"):
        assert len(re.findall(rf"\b{re.escape(page.name)}$", navigation, re.MULTILINE)) == 1, page


@pytest.mark.costly
@pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is in the group docs")
def test_site_builds_strictly(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "linear_logprob" in api


def test_prose_reads_sentences_and_leaves_code_out():
    text = (
        "# A title that is left out here\n\nThe first sentence has `some_code` and words. "
        "Short one. The [third](page.md) one\nruns over two lines of text.\n\n```\nnot a sentence "
        "of this page at all.\n```\n\n| a cell of a table is no sentence. |\n\n- An item of a list "
        "is one too."
    )
    assert list(sentences(text)) == [
        "The first sentence has name and words.",
        "The third one runs over two lines of text.",
        "An item of a list is one too.",
    ]


@pytest.mark.skipif(find_spec("textstat") is None, reason="textstat is in the group docs")
def test_prose_prints_the_hardest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    page = tmp_path / "page.md"
    hard = (
        "Unquestionably incomprehensible formulations characterise insufficiently edited writing."
    )
    page.write_text(f"The cat sat on the mat. {hard}\n")
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    assert prose.main([str(page), "--count", "1"]) == 0
    assert hard in capsys.readouterr().out
