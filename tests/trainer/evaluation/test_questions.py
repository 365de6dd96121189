"""Question files: the real ones, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation.benchmarks import (
    FIRST_VERSION,
    SECOND_VERSION,
    arena_version,
    markdown_counts,
)
from widemargin.trainer.evaluation.questions import (
    alpaca_outputs,
    alpaca_questions,
    arena_outputs,
    arena_questions,
)

from tests.support.eval_files import real_file, real_rows, save_alpaca, save_arena


def test_real_question_files():
    questions = alpaca_questions(real_file("alpaca_eval_instructions.json.gz"))
    assert [q.row for q in questions] == real_rows("alpaca_eval_instructions.json.gz")
    assert len(questions) == 805
    for name, count, version in (
        ("arena_hard_v0.1_question.jsonl.gz", 500, FIRST_VERSION),
        ("arena_hard_v2.0_question.jsonl.gz", 750, SECOND_VERSION),
    ):
        found = arena_questions(real_file(name))
        assert len(found) == count
        assert arena_version(found) == version
        assert [q.prompt for q in found] == [row["prompt"] for row in real_rows(name)]


def test_real_answers():
    outputs = alpaca_outputs(real_file("alpaca_eval_baseline_sample.json.gz"))
    rows = real_rows("alpaca_eval_baseline_sample.json.gz")
    assert outputs == {row["instruction"]: row["output"] for row in rows}
    for name in (
        "arena_hard_v0.1_answer_sample.jsonl.gz",
        "arena_hard_v2.0_answer_sample.jsonl.gz",
    ):
        answers = arena_outputs(real_file(name))
        assert answers == {
            row["uid"]: row["messages"][1]["content"]["answer"] for row in real_rows(name)
        }


def test_markdown_is_counted_as_arena_hard_counts_it():
    for row in real_rows("arena_hard_v2.0_answer_sample.jsonl.gz"):
        counts = markdown_counts(row["messages"][1]["content"]["answer"])
        assert counts == {key: n for key, n in row["metadata"].items() if key != "token_len"}


def test_markdown_by_hand():
    text = "# a\n## b\n```\n# code\n- c\n```\n- one\n* two\n3. three\n**bold** __it__ ** no\n**"
    counts = markdown_counts(text)
    assert counts["header_count"] == {"h1": 1, "h2": 1, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert counts["list_count"] == {"ordered": 1, "unordered": 2}
    assert counts["bold_count"] == {"**": 1, "__": 1}


def test_gzip_byte_order_mark_and_first_layout(tmp_path):
    text = "\ufeff" + '[{"instruction": "a", "dataset": "d", "more": 1}, {"instruction": "b"}]\n'
    path = tmp_path / "q.json.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert [(q.id, q.prompt) for q in alpaca_questions(str(path))] == [("0", "a"), ("1", "b")]
    first = tmp_path / "first.jsonl"
    row = {"question_id": "x", "category": FIRST_VERSION, "turns": [{"content": "hi"}]}
    first.write_text(json.dumps(row) + "\n\n")
    (question,) = arena_questions(str(first))
    assert (question.id, question.prompt) == ("x", "hi")
    assert arena_version([question]) == FIRST_VERSION


BAD_ALPACA = {
    "empty": ("", "line 1: expected a JSON list"),
    "object": ("{}", "line 1: expected a JSON list"),
    "no items": ("[]", "the list is empty"),
    "number": ('[\n{"instruction": "a"},\n{"instruction": 5}\n]', "line 3 (item 2)"),
    "other key": ('[{"instruction": "a"}, {"inst": "b"}]', "(item 2): instruction is missing"),
    "blank": ('[\n{"instruction": " "}]', "(item 1): instruction: expected"),
    "text": ('[\n\n"words"]', "line 3: expected an object"),
    "no comma": ('[{"instruction": "a"}\n{"instruction": "b"}]', "line 2"),
    "word": ('[{"instruction": "a"},\n{"instruction": tru}]', "line 2: not valid"),
    "cut": ('[{"instruction": "a"}', "line 1: not valid JSON"),
    "more": ('[{"instruction": "a"}]\n[]', "line 2: there is something after"),
    "dataset": ('[{"instruction": "a", "dataset": 3}]', "dataset: expected text"),
}
ONE = '{"uid": "a", "prompt": "x"}\n'
BAD_ARENA = {
    "empty": ("", "the file is empty"),
    "cut": (ONE + '{"uid": "a"', "line 2: not valid JSON"),
    "list": (ONE + "[1]", "line 2: expected an object"),
    "no id": ('{"prompt": "x"}', "line 1: uid is missing"),
    "prompt": ('{"uid": "a", "prompt": ["x"]}', "line 1: prompt: expected text"),
    "no prompt": ('{"uid": "a"}', "line 1: prompt is missing"),
    "twice": (ONE + "\n" + ONE, "line 3: a is on line 1 already"),
    "no turns": ('{"question_id": "a", "turns": []}', "line 1: turns"),
    "turn": ('{"question_id": "a", "turns": [{"content": 1}]}', "line 1: content"),
}


@pytest.mark.parametrize(
    ("read", "text", "named"),
    [
        pytest.param(read, text, named, id=f"{read.__name__}, {kind}")
        for read, bad in ((alpaca_questions, BAD_ALPACA), (arena_questions, BAD_ARENA))
        for kind, (text, named) in bad.items()
    ],
)
def test_broken_questions_are_told_by_file_and_line(tmp_path, read, text, named):
    path = tmp_path / "questions"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read(str(path))
    assert str(path) in str(refused.value)
    assert named in str(refused.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "latin").write_bytes(b'[\n{"instruction": "\xe9"}]')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        alpaca_questions(str(tmp_path / "latin"))
    with pytest.raises(UserError, match="none"):
        arena_questions(str(tmp_path / "none"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"words" * 99)[:-9])
    with pytest.raises(UserError, match="cut"):
        alpaca_questions(str(tmp_path / "cut.gz"))
    (tmp_path / "other").write_text('{"uid": "a", "messages": []}\n')
    with pytest.raises(UserError, match="line 1: no Arena-Hard answer"):
        arena_outputs(str(tmp_path / "other"))


def test_a_hub_that_does_not_answer(monkeypatch):
    import huggingface_hub

    asked = []

    def refuse(*args, **kwargs):
        asked.append((args, kwargs))
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match="--questions"):
        alpaca_questions("owner/data:folder/file.json")
    assert asked == [(("owner/data", "folder/file.json"), {"repo_type": "dataset"})]


def test_a_hub_that_does(monkeypatch, tmp_path):
    import huggingface_hub

    path = save_alpaca(tmp_path / "q.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: path)
    assert len(alpaca_questions("owner/data:q.json")) == 5
    assert len(arena_questions(save_arena(tmp_path / "q.jsonl"))) == 3
