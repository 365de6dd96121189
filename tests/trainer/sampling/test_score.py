"""Scores by a function, a judge and a reward model, and answers that get none."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from widemargin.trainer.cli import main

from tests.support.eval_files import chat_endpoint, said, save_model
from tests.support.sampling import records, save_answers
from tests.support.tiny_models import SHAPE, TOKENIZER
from tests.trainer.test_cli import assert_one_line_error

RULES = """
import math

def words(prompt, answer, row):
    assert prompt[-1]["role"] == "user"
    return len(answer.split()) + 10 * row["gold"]

def fails(prompt, answer, row):
    return math.nan if row["gold"] else {}["nothing"]
"""
ANSWERS = {
    "What is water?": [{"output": "wet"}, {"output": "it is wet"}, {"output": " "}],
    "Say no": [{"output": "no"}, {"output": "yes or no"}, {"output": "", "finish": "length"}],
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "rules.py").write_text(RULES)
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "raises.py").write_text("f = nothing")
    monkeypatch.delitem(__import__("sys").modules, "rules", raising=False)
    return save_answers(tmp_path / "out", ANSWERS)


def score(folder: Path, by: str, *more: str) -> list[str]:
    return ["score", str(folder), "--by", by, *more]


def test_a_function_gets_prompt_answer_and_row(folder, capsys):
    assert main(score(folder, "python:rules:words")) == 0
    made = records(folder, "scores-python-rules-words")
    scores = {row["id"]: row["score"] for row in made}
    assert scores == {"p0:0": 1, "p0:1": 3, "p0:2": None, "p1:0": 11, "p1:1": 13, "p1:2": None}
    printed = capsys.readouterr().out
    assert "4 scores, from 1 to 13" in printed
    assert "answers without text: 2" in printed


def test_another_function_is_another_run(folder, capsys):
    command = score(folder, "python:rules:words", "--name", "s")
    assert main(command) == 0
    source = folder.parent / "rules.py"
    source.write_text(RULES + "\n# changed\n")
    assert_one_line_error(command, "give another --name", capsys)
    source.write_text(RULES)
    with (folder / "answers.settings.json").open("a") as settings:
        settings.write(" ")  # answers made by other settings
    assert_one_line_error(command, "answers: ", capsys)


def test_failures_are_kept_counted_and_stop_beyond_a_share(folder, capsys):
    command = score(folder, "python:rules:fails", "--name", "s")
    assert_one_line_error(command, "--max-failures", capsys)
    assert main([*command, "--max-failures", "1"]) == 0
    why = {row["id"]: row["why"] for row in records(folder, "scores-s")}
    assert why["p0:0"] == "KeyError: 'nothing'"
    assert why["p1:0"] == "the score is nan"
    assert "without a score: 4" in capsys.readouterr().out
    assert all(row["score"] is None for row in records(folder, "scores-s"))


@pytest.mark.parametrize(
    ("by", "named"),
    [
        ("python:nowhere:f", "cannot be imported"),
        ("python:rules:nothing", "cannot be imported"),
        ("python:rules", "expected python:MODULE:FUNCTION, such as"),
        ("python:rules.py:words", "expected python:MODULE:FUNCTION, such as"),
        ("python:broken:f", "broken:f: cannot be imported: SyntaxError"),
        ("python:raises:f", "raises:f: cannot be imported: NameError"),
        ("rules", "--by: expected model:DIR"),
        ("judge:", "--by: expected"),
        ("python:rules:words --name=a/b", "--name: give letters"),
        ("model:/no/such", "/no/such"),
    ],
)
def test_scorers_that_are_none(folder, capsys, by, named):
    assert_one_line_error(score(folder, *by.split()), named, capsys)


def test_there_must_be_answers(tmp_path, capsys):
    command = score(tmp_path, "python:rules:words")
    assert_one_line_error(command, "FOLDER: give the one that widemargin generate wrote", capsys)


def test_a_judge_rates_each_answer_once(folder, capsys):
    def rate(body, number):
        shown = json.loads(body["messages"][1]["content"])
        assert body["temperature"] == 0
        return 200, said(json.dumps({"score": len(shown["answer"])}))

    with chat_endpoint(rate) as (url, seen):
        command = score(folder, "judge:j", f"--judge_url={url}", "--batch_size=3")
        assert main(command) == 0
        assert main(command) == 0
    assert len(seen) == 4
    scores = {row["id"]: row["score"] for row in records(folder, "scores-judge-j")}
    assert scores == {"p0:0": 3, "p0:1": 9, "p0:2": None, "p1:0": 2, "p1:1": 9, "p1:2": None}
    assert_one_line_error(score(folder, "judge:j", "--judge_url=ftp://x"), "--judge-url", capsys)


def test_a_judge_that_answers_nonsense_leaves_the_answer_unscored(folder, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)

    def rate(body, number):
        shown = json.loads(body["messages"][1]["content"])
        replies = {"no": "I like it!", "wet": '{"score": 11}'}
        return 200, said(replies.get(shown["answer"], '{"score": 7}'))

    with chat_endpoint(rate) as (url, _):
        command = score(folder, "judge:j", f"--judge_url={url}", "--max-failures", "0.5")
        assert main(command) == 0
    made = {row["id"]: row for row in records(folder, "scores-judge-j")}
    assert [made[key]["score"] for key in ("p0:0", "p0:1", "p1:0")] == [None, 7, None]
    assert "without one score from 1 to 10" in made["p0:0"]["why"]


def reward_model(folder: Path, labels: int = 1, **changes) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"initializer_range": 0.2, "num_labels": labels} | changes)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model


def test_a_reward_model_scores_a_batch_as_each_answer_alone(folder, tmp_path):
    """Answers end in the padding token, which a padded batch must not mistake for padding."""
    eos = SHAPE["eos_token_id"]
    model = reward_model(tmp_path / "reward", pad_token_id=eos)
    assert main(score(folder, f"model:{tmp_path / 'reward'}", "--dtype=float32")) == 0
    made = {row["id"]: row["score"] for row in records(folder, "scores-model-reward")}
    for number, (text, several) in enumerate(ANSWERS.items()):
        for k, answer in enumerate(several[:2]):
            talk = [{"role": "user", "content": text}]
            talk.append({"role": "assistant", "content": answer["output"]})
            written = TOKENIZER.apply_chat_template(talk, tokenize=False)
            ids = torch.tensor([TOKENIZER(written, add_special_tokens=False)["input_ids"]])
            hidden = model.model(ids).last_hidden_state[0, -1]
            alone = model.score(hidden).item()
            assert math.isclose(made[f"p{number}:{k}"], alone, rel_tol=1e-4, abs_tol=1e-6)


def test_a_conversation_beyond_the_context_is_cut_on_the_left_and_counted(tmp_path, capsys):
    answers = {"yes " * 30: [{"output": "no"}], "no": [{"output": "yes"}]}
    folder = save_answers(tmp_path / "out", answers)
    reward_model(tmp_path / "reward", max_position_embeddings=24)
    assert main(score(folder, f"model:{tmp_path / 'reward'}", "--name", "s")) == 0
    assert [bool(row["why"]) for row in records(folder, "scores-s")] == [True, False]
    assert "prompt cut on the left: 1" in capsys.readouterr().out


def test_models_without_one_trained_score_are_refused(folder, tmp_path, capsys):
    causal = save_model(tmp_path / "causal")
    assert_one_line_error(score(folder, f"model:{causal}"), "lacks score.weight", capsys)
    reward_model(tmp_path / "two", labels=2)
    assert_one_line_error(score(folder, f"model:{tmp_path / 'two'}"), "2 numbers", capsys)
    tokenizer = TOKENIZER.chat_template
    reward_model(tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    assert TOKENIZER.chat_template == tokenizer
    assert_one_line_error(score(folder, f"model:{tmp_path / 'mute'}"), "chat_template:", capsys)
