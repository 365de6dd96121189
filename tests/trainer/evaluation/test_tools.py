"""The benchmarks' own tools: called with a key, and shown how to call without."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from widemargin.trainer.cli import main
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation import tools

from tests.support.eval_files import chat_endpoint, save_alpaca, save_model

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
    baseline = tmp_path / "baseline.json.gz"
    baseline.write_bytes(gzip.compress(b"[]"))
    tools.alpaca_eval(path, "http://x/v1", str(baseline), call=True)
    ((command, options),) = ran
    reference = tmp_path / "reference_outputs.json"  # the tool reads no .gz
    assert command[-4:] == [
        "--model_outputs",
        str(path),
        "--reference_outputs",
        str(reference),
    ]
    assert reference.read_text() == "[]"
    assert options["env"]["OPENAI_API_BASE"] == "http://x/v1"
    with pytest.raises(UserError, match="ended with code 1"):
        tools.alpaca_eval(path, None, str(baseline), call=True)
    tools.alpaca_eval(path, None, None, call=False)
    monkeypatch.delenv("OPENAI_API_KEY")
    tools.alpaca_eval(path, None, str(baseline), call=True)
    assert len(ran) == 2
    printed = capsys.readouterr().out
    shown = f"OPENAI_API_KEY=... alpaca_eval --model_outputs '{path}' --reference_outputs "
    assert f'{shown}"$(hf download tatsu-lab/alpaca_eval alpaca_eval_gpt4_baseline.json' in printed
    assert f"{shown}{baseline}" in printed
    assert KEY not in printed


def preference(body: Any, number: int) -> tuple[int, bytes]:
    """A judge that answers as alpaca_eval asks: one token with its likeliest rivals."""
    likely = {"token": "m", "bytes": [109], "logprob": -0.3}
    rival = {"token": "M", "bytes": [77], "logprob": -1.5}
    choice = {
        "index": 0,
        "finish_reason": "length",
        "message": {"role": "assistant", "content": "m"},
        "logprobs": {"content": [likely | {"top_logprobs": [likely, rival]}]},
    }
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    about = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
    return 200, json.dumps(about | {"choices": [choice], "usage": usage}).encode()


def hub_cache(folder: Path) -> Path:
    """A hub cache with what AlpacaEval's length control is fitted on, made up."""
    data = folder / "datasets--tatsu-lab--alpaca_eval"
    (data / "refs").mkdir(parents=True)
    (data / "refs" / "main").write_text("0" * 40)
    snapshot = data / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    rows = [
        f"{model},{(i % 7) / 7},{i},{(i % 5) - 2},{(i % 3) - 1},False"
        for model in "ab"
        for i in range(805)
    ]
    columns = "model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline"
    (snapshot / "df_gamed.csv").write_text("\n".join([columns, *rows]) + "\n")
    return folder


@pytest.mark.skipif(
    find_spec("alpaca_eval") is None,
    reason="alpaca_eval is not installed (it is in the eval extra; make test-eval)",
)
def test_the_installed_alpaca_eval_reads_and_judges_the_file(tmp_path, monkeypatch):
    """The whole way through the package, to its win rates; its judge is on loopback."""
    utils = import_module("alpaca_eval.utils")
    package = Path(str(utils.__file__)).parent  # copied: it keeps judgments and weights in itself
    shutil.copytree(package, tmp_path / "own" / "alpaca_eval")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache(tmp_path / "hub")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    questions = save_alpaca(tmp_path / "q.json", 8)
    asked = json.loads(Path(questions).read_text())
    baseline = tmp_path / "baseline.json"
    rows = [row | {"output": "no " * i, "generator": "base"} for i, row in enumerate(asked, 1)]
    baseline.write_text(json.dumps(rows))
    out = tmp_path / "out"
    command = ["evaluate", "alpaca-eval", "--model", save_model(tmp_path / "tiny")]
    command += ["--questions", questions, "--out", str(out), "--max_new_tokens=6"]
    with chat_endpoint(preference) as (url, seen):
        assert main([*command, "--judge-url", url, "--baseline", str(baseline)]) == 0
    frame = utils.load_or_convert_to_dataframe(out / "model_outputs.json")
    assert frame["generator"].unique().tolist() == ["tiny"]
    assert frame["output"].map(type).eq(str).all()
    judged = json.loads((out / "weighted_alpaca_eval_gpt4_turbo" / "annotations.json").read_text())
    written = {row["instruction"]: row["output"] for row in frame.to_dict("records")}
    assert {row["instruction"]: row["output_2"] for row in judged} == written
    assert len(seen) == 8
    (board,) = csv.DictReader((out / "weighted_alpaca_eval_gpt4_turbo" / "leaderboard.csv").open())
    assert board[""] == "tiny"
    assert 0 <= float(board["length_controlled_winrate"]) <= 100


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
