"""Which answers become pairs, why others do not, and that training reads what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from widemargin.trainer.cli import main
from widemargin.trainer.data import DataSettings
from widemargin.trainer.data.pairs import tokenize_pairs

from tests.support.eval_files import save_model
from tests.support.sampling import generate, prompts_file, records, save_answers
from tests.support.tiny_models import TOKENIZER
from tests.support.tiny_tokenizers import tiny_tokenizer
from tests.trainer.test_cli import assert_one_line_error


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"output": text} for text in texts]


ANSWERS = {
    "good": said("a", "b b", "c c c", "d d d d"),
    "alike": said("same", "same", "same", "same"),
    "tied": said("a", "b", "c", "d"),
    "cut": [*said("a"), *({"output": f"{i}", "finish": "length"} for i in range(3))],
    "unscored": said("a", "b", "c", "d"),
    "silent": said("a", " ", "", ""),
    "close": said("a", "b b b b b b", "c", "d"),
}
SCORES = {
    "good": [1.0, 4.0, 2.0, 3.0],
    "alike": [1.0, 2.0, 3.0, 4.0],
    "tied": [1.0] * 4,
    "cut": [1.0, 2.0, 3.0, 4.0],
    "unscored": [1.0, None, None, None],
    "silent": [1.0, None, None, None],
    "close": [1.0, 1.5, 1.2, 1.1],
}
DROPPED = {
    "p1": "answers all the same",
    "p2": "no preference between the answers",
    "p3": "unfinished answers",
    "p4": "answers not scored",
    "p5": "answers without text",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_answers(tmp_path / "out", ANSWERS, SCORES)


def pair(folder: Path, *more: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows written, and the report."""
    out = folder.parent / "pairs.jsonl"
    assert main(["pair", str(folder), "--out", str(out), *more]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, json.loads((folder.parent / "pairs.report.json").read_text())


def texts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_the_best_against_the_worst_and_why_the_rest_is_left_out(folder, capsys):
    rows, report = pair(folder)
    assert texts(rows) == [("b b", "a"), ("b b b b b b", "a")]
    assert (rows[0]["score_chosen"], rows[0]["score_rejected"]) == (4, 1)
    assert rows[0]["prompt"] == [{"role": "user", "content": "good"}]
    assert rows[0]["prompt_id"] == "p0"
    assert "margin" not in rows[0]  # training would add it to its target
    assert report["dropped"] == DROPPED
    assert report["mean_length"] == {"chosen": 4, "rejected": 1}
    printed = capsys.readouterr().out
    assert "2 pairs of 2 of 7 prompts" in printed
    for reason in DROPPED.values():
        assert reason in printed


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--rule", "best-vs-rest"], [("b b", "d d d d"), ("b b", "c c c"), ("b b", "a")]),
        (["--rule", "best-vs-rest", "--min-gap", "2"], [("b b", "c c c"), ("b b", "a")]),
        (["--rule", "best-vs-rest", "--max-length-ratio", "1.5"], [("b b", "c c c")]),
        (["--rule", "all", "--min-gap", "2"], [("b b", "c c c"), ("b b", "a"), ("d d d d", "a")]),
    ],
)
def test_rules_gaps_and_length_ratios(folder, more, expected):
    rows, report = pair(folder, *more)
    assert texts([row for row in rows if row["prompt_id"] == "p0"]) == expected
    if "--min-gap" in more:
        assert report["dropped"]["p6"] == "scores too close"
    if "--max-length-ratio" in more:
        assert report["dropped"]["p6"] == "lengths too far apart"


def test_unfinished_answers_stay_if_asked(folder):
    rows, _ = pair(folder, "--keep-unfinished")
    assert ("2", "a") in texts(rows)


def test_a_folder_without_prompts_is_refused(folder, tmp_path, capsys):
    for path in folder.glob("*.jsonl"):
        path.write_text("")
    command = ["pair", str(folder), "--out", str(tmp_path / "p.jsonl")]
    assert_one_line_error(command, "no prompts", capsys)


def test_balance_leaves_out_the_longest_of_the_more_frequent_kind(tmp_path):
    answers = {str(i): said("x" * (i + 1) + " y" * i, "z") for i in range(5)}
    scores: dict[str, list[float | None]] = {str(i): [2.0, 1.0] for i in range(4)}
    scores["4"] = [1.0, 2.0]
    rows, report = pair(save_answers(tmp_path / "out", answers, scores), "--balance-length")
    assert [row["prompt_id"] for row in rows] == ["p0", "p1", "p4"]
    assert report["chosen_longer"] == report["rejected_longer"] == pytest.approx(1 / 3)
    assert report["dropped"] == dict.fromkeys(["p2", "p3"], "left out to balance lengths")


def test_score_and_length_are_compared(folder, capsys):
    _, report = pair(folder)
    linked = report["correlation_of_score_and_length"]
    assert set(linked) == {"of all answers", "within prompts"}
    assert -1 <= linked["within prompts"] <= 1
    assert "correlation of score and length" in capsys.readouterr().out


def test_trees_and_labels_hold_the_answers_of_the_pairs(folder):
    trees, _ = pair(folder, "--as", "trees", "--rule", "best-vs-rest", "--min-gap", "2")
    assert [tree["scores"] for tree in trees] == [[1, 4, 2]]
    assert [answer[0]["content"] for answer in trees[0]["completions"]] == ["a", "b b", "c c c"]
    rows, _ = pair(folder, "--as", "kto", "--rule", "best-vs-rest", "--min-gap", "2")
    labels = [(row["completion"][0]["content"], row["label"]) for row in rows]
    assert labels == [("a", False), ("b b", True), ("c c c", False)]


def test_pairs_and_trees_train_alike(folder):
    """Training makes of the trees the pairs that are written."""
    settings = DataSettings(edges="best-vs-rest", group_by_prompt=True)
    rows, _ = pair(folder, "--rule", "best-vs-rest", "--min-gap", "2")
    trees, _ = pair(folder, "--as", "trees", "--rule", "best-vs-rest", "--min-gap", "2")
    made = [tokenize_pairs(Dataset.from_list(it), TOKENIZER, settings)[0] for it in (rows, trees)]
    ids = [{(*map(tuple, (r["chosen_ids"], r["rejected_ids"])),) for r in it} for it in made]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 2


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> tuple[str, Path]:
    """A model, and a folder of its answers with scores."""
    place = tmp_path_factory.mktemp("sampled")
    model = save_model(place / "model")
    folder = place / "out"
    assert main(generate(model, prompts_file(place), folder, "--n", "4")) == 0
    (place / "lengths.py").write_text("def size(p, a, r): return len(a)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["score", str(folder), "--by", "python:lengths:size"]) == 0
    return model, folder


def test_what_was_sampled_is_what_is_trained(sampled):
    """Training reads the sampled ids, whatever tokens their text would have."""
    model, folder = sampled
    rows, _ = pair(folder, "--tokens-for", model, "--keep-unfinished")
    made = {tuple(row["token_ids"]) for row in records(folder, "answers")}
    asked = {tuple(row["token_ids"]) for row in records(folder, "prompts")}
    tokens, _ = tokenize_pairs(Dataset.from_list(rows), TOKENIZER)
    assert len(tokens) == len(rows) > 0
    for row in tokens:
        assert {tuple(row["chosen_ids"]), tuple(row["rejected_ids"])} <= made
        assert tuple(row["prompt_ids"]) in asked


def test_another_tokenizer_gets_no_token_ids(sampled, tmp_path, capsys):
    _, folder = sampled
    other = tiny_tokenizer()
    other.add_tokens(["Rome"])
    other.save_pretrained(save_model(tmp_path / "other"))
    command = ["pair", str(folder), "--out", str(tmp_path / "p.jsonl")]
    command += ["--tokens-for", str(tmp_path / "other")]
    assert_one_line_error(command, "is not that of", capsys)


def test_a_server_s_answers_have_no_token_ids(folder, tmp_path, capsys):
    command = ["pair", str(folder), "--out", str(tmp_path / "p.jsonl"), "--tokens-for", "m"]
    assert_one_line_error(command, "as text alone", capsys)


def test_lengths_are_characters_where_a_server_did_not_count(tmp_path):
    answers = {"q": [{"output": "aa", "tokens": None}, {"output": "b", "tokens": 1}]}
    _, report = pair(save_answers(tmp_path / "out", answers, {"q": [1.0, 2.0]}))
    assert report["length_unit"] == "characters"
    assert report["mean_length"] == {"chosen": 1, "rejected": 2}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--rule", "worst"], "--rule: expected one of"),
        (["--as", "list"], "--as: expected one of"),
        (["--min-gap", "-1"], "--min-gap"),
        (["--min-gap", "9"], "error: lower --min-gap; no prompt of"),
        (["--max-length-ratio", "0.5"], "--max-length-ratio"),
        (["--as", "kto", "--rule", "all"], "--rule: give best-worst"),
        (["--as", "trees", "--tokens-for", "m"], "--tokens-for: leave out --as"),
        (["--scores", "other"], "--scores: name one of s"),
        (["--out", "."], "--out: give a file's name, such as pairs.jsonl; . is a folder"),
        (["--beta=1"], "unknown arguments: --beta=1"),
    ],
)
def test_bad_arguments(folder, tmp_path, capsys, more, named):
    command = ["pair", str(folder), "--out", str(tmp_path / "p.jsonl"), *more]
    assert_one_line_error(command, named, capsys)
    assert not (tmp_path / "p.jsonl").exists()


def test_records_are_never_overwritten(folder, capsys):
    before = (folder / "answers.jsonl").read_bytes()
    command = ["pair", str(folder), "--out", str(folder / "answers.jsonl")]
    assert_one_line_error(command, "--out: give another name", capsys)
    assert (folder / "answers.jsonl").read_bytes() == before


def test_scores_of_other_answers_are_refused(tmp_path, capsys):
    """Answers have ids by prompt and number, whatever they say."""
    scores: dict[str, list[float | None]] = {"a": [1.0, 2.0]}
    folder = save_answers(tmp_path / "out", {"a": said("x", "y")}, scores)
    for path in folder.glob("answers*"):
        path.unlink()
    save_answers(folder, {"a": said("x", "z")})
    command = ["pair", str(folder), "--out", str(tmp_path / "p.jsonl")]
    assert_one_line_error(command, "the answer p0:1 has changed since", capsys)


def test_a_folder_that_is_not_finished_is_refused(tmp_path, capsys):
    uneven = {"a": said("x", "y"), "b": said("x")}
    folder = save_answers(tmp_path / "uneven", uneven, {"a": [1.0, 2.0], "b": [1.0]})
    command = ["pair", str(folder), "--out", str(tmp_path / "p.jsonl")]
    assert_one_line_error(command, "run the same widemargin generate again", capsys)
    bare = save_answers(tmp_path / "bare", uneven)
    assert_one_line_error(["pair", str(bare), *command[2:]], "run widemargin score", capsys)
    (folder / "scores-s.jsonl").write_text("")
    assert_one_line_error(command, "run the same widemargin score again; 3 answers", capsys)
    (folder / "scores-t.jsonl").write_text("")
    assert_one_line_error(command, "--scores: name one of s, t", capsys)


def test_what_a_failed_scorer_left_is_no_choice(folder):
    (folder / "scores-failed.jsonl").write_text("")
    assert pair(folder)[1]["scores"] == "s"
