"""AlpacaEval and Arena-Hard: answers by a tiny model, continued runs, and the files written."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from widemargin.trainer.cli import main
from widemargin.trainer.evaluation import answer_engines, answering

from tests.support.eval_files import real_rows, save_alpaca, save_arena, save_model
from tests.support.tiny_models import TOKENIZER
from tests.trainer.test_cli import assert_one_line_error


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def alpaca(model: str, questions: str, out: Path, *more: str) -> list[str]:
    """The command line of a short run."""
    options = ["--model", model, "--questions", questions, "--out", str(out)]
    short = ["--batch_size=2", "--max_new_tokens=6"]
    return ["evaluate", "alpaca-eval", *options, *short, *more]


def outputs(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "model_outputs.json").read_text())


def test_alpaca_eval_writes_what_the_tool_reads(model, tmp_path, capsys):
    questions = save_alpaca(tmp_path / "q.json")
    assert main(alpaca(model, questions, tmp_path / "out")) == 0
    rows = outputs(tmp_path / "out")
    sample = real_rows("alpaca_eval_baseline_sample.json.gz")[0]
    assert [list(row) for row in rows] == [list(sample)] * 5
    assert [row["instruction"] for row in rows] == [
        row["instruction"] for row in json.loads(Path(questions).read_text())
    ]
    assert {row["generator"] for row in rows} == {"tiny"}
    printed = capsys.readouterr().out
    assert "characters: mean" in printed
    assert "tokens: mean" in printed
    assert "alpaca_eval --model_outputs" in printed
    lengths = json.loads((tmp_path / "out" / "lengths.json").read_text())["lengths"]
    assert lengths["questions"] == 5
    assert lengths["characters"]["max"] == max(len(r["output"]) for r in records(tmp_path / "out"))


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (out / "answers.jsonl").read_text().splitlines()]


def test_greedy_answers_are_generate_s_own_for_each_question_alone(model, tmp_path):
    questions = save_alpaca(tmp_path / "q.json", 3)
    assert main(alpaca(model, questions, tmp_path / "out", "--dtype=float32")) == 0
    loaded: Any = AutoModelForCausalLM.from_pretrained(model).eval()
    for row, record in zip(
        json.loads(Path(questions).read_text()),
        sorted(records(tmp_path / "out"), key=lambda r: int(r["id"])),
        strict=True,
    ):
        chat = [{"role": "user", "content": row["instruction"]}]
        text = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([TOKENIZER(text, add_special_tokens=False)["input_ids"]])
        ends = [TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|end|>")]
        written = loaded.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=ends)[0]
        answer = [i for i in written[ids.shape[1] :].tolist() if i not in ends]
        assert record["output"] == TOKENIZER.decode(answer, skip_special_tokens=True)
        assert record["tokens"] == len(answer)


class Stopped(Exception):
    pass


def test_stopped_and_continued_is_uninterrupted(model, tmp_path, monkeypatch, capsys):
    """Sampled, so that a changed batch or seed would show; cut in the middle of a batch."""
    questions = save_alpaca(tmp_path / "q.json", 7)
    sampled = ("--temperature=1.5", "--top_k=50")
    assert main(alpaca(model, questions, tmp_path / "whole", *sampled)) == 0
    complete = answer_engines.TransformersEngine.complete
    calls = []

    def stop_at_third(self, prompts, seeds):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise Stopped
        return complete(self, prompts, seeds)

    monkeypatch.setattr(answer_engines.TransformersEngine, "complete", stop_at_third)
    with pytest.raises(Stopped):
        main(alpaca(model, questions, tmp_path / "cut", *sampled))
    path = tmp_path / "cut" / "answers.jsonl"
    content = path.read_bytes()
    assert content.count(b"\n") == 4
    path.write_bytes(content[:-10])  # and half a line of a batch is lost too
    assert main(alpaca(model, questions, tmp_path / "cut", *sampled)) == 0
    assert "3 of 7 answers are in" in capsys.readouterr().out
    assert calls == [2, 2, 2, 2, 2, 1]
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    assert len({r["id"] for r in records(tmp_path / "cut")}) == len(records(tmp_path / "cut")) == 7
    monkeypatch.setattr(answering, "make_engine", None)  # nothing is left to do: no model is loaded
    assert main(alpaca(model, questions, tmp_path / "cut", *sampled)) == 0


def test_another_seed_or_model_is_another_run(model, tmp_path, capsys):
    questions = save_alpaca(tmp_path / "q.json", 2)
    own = save_model(tmp_path / "m")
    assert main(alpaca(own, questions, tmp_path / "out", "--temperature=2")) == 0
    for change, named in (("--seed=7", "seed: 42 before, 7 now"), ("--limit=1", "questions: 2")):
        again = alpaca(own, questions, tmp_path / "out", "--temperature=2", change)
        assert_one_line_error(again, named, capsys)
    save_model(tmp_path / "m", seed=1)  # trained further, in its place
    again = alpaca(own, questions, tmp_path / "out", "--temperature=2")
    assert_one_line_error(again, "model_fingerprint", capsys)
    assert main(alpaca(own, questions, tmp_path / "new", "--temperature=2")) == 0
    assert outputs(tmp_path / "new") != outputs(tmp_path / "out")


def test_default_folder_names_and_limit(model, tmp_path):
    own = save_model(tmp_path / "m")
    command = alpaca(own, save_alpaca(tmp_path / "q.json"), tmp_path, "--limit", "2")
    del command[command.index("--out") : command.index("--out") + 2]
    assert main([*command, "--generator=mine"]) == 0
    rows = outputs(tmp_path / "m" / "evaluation" / "alpaca-eval")
    assert [row["generator"] for row in rows] == ["mine", "mine"]


def test_prompts_longer_than_the_model_are_told(tmp_path, capsys):
    short = save_model(tmp_path / "m", max_position_embeddings=40)
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"instruction": "yes " * n} for n in (1, 20, 60)]))
    assert main(alpaca(short, str(path), tmp_path / "out", "--max_new_tokens=300")) == 0
    by_id = {record["id"]: record for record in records(tmp_path / "out")}
    assert by_id["2"]["finish"] == "prompt too long"
    assert by_id["2"]["output"] == ""
    assert "prompt too long: 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "version"), [("v0.1", "arena-hard-v0.1"), ("v2.0", "arena-hard-v2.0")]
)
def test_arena_hard_writes_the_layout_of_the_samples(model, tmp_path, name, version, capsys):
    sample = real_rows(f"arena_hard_{name}_answer_sample.jsonl.gz")[0]
    asked = real_rows(f"arena_hard_{name}_question.jsonl.gz")
    asked = sorted(asked, key=lambda row: len(row["prompt"]))[:2]
    questions = tmp_path / "question.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = ["--model", model, "--questions", str(questions), "--out", str(tmp_path / "out")]
    assert main(["evaluate", "arena-hard", *options, "--max_new_tokens=5"]) == 0
    path = tmp_path / "out" / version / "model_answer" / "tiny.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert [shape(row) for row in rows] == [shape(sample)] * 2
    assert [row["uid"] for row in rows] == sorted(row["uid"] for row in asked)
    prompts = {row["uid"]: row["prompt"] for row in asked}
    for row in rows:
        assert row["messages"][0]["content"] == prompts[row["uid"]]
        assert re.fullmatch(r"[2-9A-HJ-NP-Za-km-z]{22}", row["ans_id"])
    assert "--arena-hard-dir" in capsys.readouterr().out


def shape(value: Any) -> Any:
    """Keys and types, order of keys aside."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    return [shape(part) for part in value] if isinstance(value, list) else type(value).__name__


def test_arena_hard_in_its_first_layout(model, tmp_path):
    asked = {
        "uid": None,
        "prompt": None,
        "question_id": "b1",
        "turns": [{"content": "Say yes"}],
        "category": "arena-hard-v0.1",
    }
    questions = save_arena(tmp_path / "q.jsonl", 1, **asked)
    options = ["--model", model, "--questions", questions, "--out", str(tmp_path / "out")]
    assert main(["evaluate", "arena-hard", *options, "--max_new_tokens=4"]) == 0
    path = tmp_path / "out" / "arena-hard-v0.1" / "model_answer" / "tiny.jsonl"
    (row,) = map(json.loads, path.read_text().splitlines())
    assert (row["question_id"], row["model_id"]) == ("b1", "tiny")
    assert isinstance(row["choices"][0]["turns"][0]["content"], str)


def test_stop_tokens_and_system_prompt(model, tmp_path, monkeypatch):
    seen = {}

    def remember(self, prompts, seeds):
        seen.update(prompts=prompts, stops=self.decoding.stops)
        return [answer_engines.Completion([], 9) for _ in prompts]

    monkeypatch.setattr(answer_engines.TransformersEngine, "complete", remember)
    questions = save_alpaca(tmp_path / "q.json", 1)
    assert main(alpaca(model, questions, tmp_path / "a")) == 0
    end = TOKENIZER.convert_tokens_to_ids("<|end|>")
    assert seen["stops"] == sorted([TOKENIZER.eos_token_id, end])
    (plain,) = seen["prompts"]
    assert plain[0] == TOKENIZER.bos_token_id
    assert plain.count(TOKENIZER.bos_token_id) == 1
    assert (
        main(alpaca(model, questions, tmp_path / "b", "--stop_token_ids=[9]", '--system_prompt=""'))
        == 0
    )
    assert seen["stops"] == [9]
    assert TOKENIZER.convert_tokens_to_ids("<|system|>") in seen["prompts"][0]


class FakeVllm:
    """vLLM's interface, as far as it is used."""

    class SamplingParams:
        def __init__(self, **options: Any) -> None:
            self.__dict__ = options

    class LLM:
        def __init__(self, **options: Any) -> None:
            self.options = options

        def generate(self, inputs: list[Any], sampling: list[Any]) -> list[Any]:
            assert len({s.seed for s in sampling}) == len(sampling)
            assert all(s.top_k == -1 for s in sampling)
            made = types.SimpleNamespace
            return [
                made(
                    outputs=[
                        made(
                            token_ids=[*i["prompt_token_ids"][1:3], s.stop_token_ids[0]],
                            finish_reason="stop",
                        )
                    ]
                )
                for i, s in zip(inputs, sampling, strict=True)
            ]


def test_vllm_has_the_same_interface(model, tmp_path, monkeypatch, capsys):
    questions = save_alpaca(tmp_path / "q.json", 3)
    command = alpaca(model, questions, tmp_path / "out", "--engine=vllm", "--temperature=0.5")
    monkeypatch.setattr(answer_engines, "find_spec", lambda name: None)
    assert_one_line_error(command, "vllm is not installed", capsys)
    monkeypatch.setattr(answer_engines, "find_spec", lambda name: object())
    monkeypatch.setitem(
        sys.modules,
        "vllm",
        types.SimpleNamespace(LLM=FakeVllm.LLM, SamplingParams=FakeVllm.SamplingParams),
    )
    assert main(command) == 0
    assert [r["tokens"] for r in records(tmp_path / "out")] == [2, 2, 2]
    assert {r["finish"] for r in records(tmp_path / "out")} == {"stop"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temprature=1"], "temperature"),
        (["--temperature=-1"], "temperature"),
        (["--temperature=hot"], "temperature"),
        (["--top_p=0"], "top_p"),
        (["--top_k=-1"], "top_k"),
        (["--max_new_tokens=0"], "max_new_tokens"),
        (["--batch_size=0"], "batch_size"),
        (["--stop_token_ids=[a]"], "stop_token_ids"),
        (["--engine=tgi"], "engine"),
        (["--generator=a/b"], "generator"),
        (["--limit", "0"], "--limit"),
        (["--chat_template=nothing"], "chat_template"),
        (["--questions", "none.json"], "none.json"),
        (["--model", "/no/such"], "/no/such"),
        (["--judge-model", "j"], "--baseline"),
        (["--baseline", "b.json"], "b.json: cannot be read"),
        (["--judge-url", "ftp://x"], "--judge-url"),
    ],
)
def test_bad_arguments(model, tmp_path, capsys, arguments, named):
    command = alpaca(model, save_alpaca(tmp_path / "q.json"), tmp_path / "out", *arguments)
    assert_one_line_error(command, named, capsys)


def test_a_template_that_refuses_is_told_by_question(model, tmp_path, capsys):
    questions = save_alpaca(tmp_path / "q.json")
    refusing = "--chat_template={{ raise_exception('no systems') }}"
    assert_one_line_error(
        alpaca(model, questions, tmp_path / "out", refusing), "no systems", capsys
    )
    assert_one_line_error(["evaluate", "alpaca-eval"], "--model", capsys)
