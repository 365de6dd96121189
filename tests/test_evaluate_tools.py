"""The benchmarks' own tools: called with a key, and shown how to call without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation import tools

KEY = "sk-very-secret-0123"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_alpaca_eval_is_called_only_with_a_key(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(tools, "find_spec", lambda name: object())
    monkeypatch.setattr(
        tools.subprocess,
        "run",
        lambda command, **kw: (
            ran.append((command, kw)) or type("Done", (), {"returncode": len(ran) - 1})
        ),
    )
    path = tmp_path / "my outputs.json"
    tools.alpaca_eval(path, "http://x/v1", call=True)
    ((command, options),) = ran
    assert command[-2:] == ["--model_outputs", str(path)]
    assert options["env"]["OPENAI_API_BASE"] == "http://x/v1"
    with pytest.raises(UserError, match="ended with code 1"):
        tools.alpaca_eval(path, None, call=True)
    tools.alpaca_eval(path, None, call=False)
    monkeypatch.delenv("OPENAI_API_KEY")
    tools.alpaca_eval(path, None, call=True)
    assert len(ran) == 2
    printed = capsys.readouterr().out
    assert f"OPENAI_API_KEY=... alpaca_eval --model_outputs '{path}'" in printed
    assert KEY not in printed


SCRIPT = "import json, os, sys; print(json.dumps(sys.argv), file=open('log', 'a'))\n"


@pytest.fixture
def clone(tmp_path) -> Path:
    """As much of a clone of Arena-Hard as is used."""
    folder = tmp_path / "clone"
    (folder / "config").mkdir(parents=True)
    for script in ("gen_judgment.py", "show_result.py"):
        (folder / script).write_text(SCRIPT)
    settings = {"judge_model": "gpt-4.1", "bench_name": "arena-hard-v2.0", "model_list": ["x", "y"]}
    (folder / "config" / "arena-hard-v2.0.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_arena_hard_is_called_in_its_clone(clone, tmp_path, monkeypatch, capsys):
    answers = tmp_path / "out" / "arena-hard-v2.0" / "model_answer" / "mine.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text('{"uid": "a"}\n')
    arguments = (clone, answers, "arena-hard-v2.0", "mine", ["hard_prompt", "creative_writing"])
    tools.arena_hard(*arguments, call=True)
    ran = [json.loads(line) for line in (clone / "log").read_text().splitlines()]
    assert [command[0] for command in ran] == [
        "gen_judgment.py",
        "show_result.py",
        "show_result.py",
    ]
    settings = yaml.safe_load(Path(ran[0][2]).read_text())
    assert settings["model_list"] == ["mine"]
    assert settings["judge_model"] == "gpt-4.1"
    assert ran[1][1:] == [
        "--benchmark",
        "arena-hard-v2.0",
        "--judge-names",
        "gpt-4.1",
        "--category",
        "hard_prompt",
    ]
    placed = clone / "data" / "arena-hard-v2.0" / "model_answer" / "mine.jsonl"
    assert placed.read_text() == answers.read_text()
    monkeypatch.delenv("OPENAI_API_KEY")
    tools.arena_hard(*arguments, call=True)
    assert f"cd {clone}" in capsys.readouterr().out
    answers.write_text('{"uid": "b"}\n')
    with pytest.raises(UserError, match="--generator"):
        tools.arena_hard(*arguments, call=True)
    (clone / "show_result.py").unlink()
    with pytest.raises(UserError, match=r"show_result\.py"):
        tools.check_arena_hard(clone, "arena-hard-v2.0")
