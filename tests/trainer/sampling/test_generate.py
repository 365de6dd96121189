"""Answers to prompts: what is read, what goes to the model, and runs that go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from widemargin.trainer.cli import main
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation import answering
from widemargin.trainer.sampling.prompts import open_prompts, read_prompts

from tests.support import tiny_models
from tests.support.eval_files import chat_endpoint, save_model
from tests.support.pair_rows import user
from tests.support.sampling import FOUR, generate, prompts_file, records
from tests.support.tiny_images import image_pairs, image_rows
from tests.trainer.test_cli import assert_one_line_error

TOKENIZER: Any = tiny_models.TOKENIZER


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


def test_answers_keep_what_was_sampled(model, tmp_path, capsys):
    """Token ids with the end that was sampled; the text is theirs, and the length counts no end."""
    assert main(generate(model, prompts_file(tmp_path), tmp_path / "out")) == 0
    made = records(tmp_path / "out", "answers")
    assert len(made) == 8
    assert [row["id"] for row in made] == [f"{row['prompt_id']}:{row['k']}" for row in made]
    ends = {TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("<|end|>")}
    for row in made:
        stopped = row["token_ids"][-1] in ends
        assert row["finish"] == ("stop" if stopped else "length")
        assert row["tokens"] == len(row["token_ids"]) - stopped
        kept = row["token_ids"][: row["tokens"]]
        assert row["output"] == TOKENIZER.decode(kept, skip_special_tokens=True)
    assert "4 prompts, 2 answers each" in capsys.readouterr().out


def test_two_then_four_answers_are_four_at_once(model, tmp_path, capsys):
    source = prompts_file(tmp_path)
    for n in (2, 4):
        assert main(generate(model, source, tmp_path / "grown", "--n", str(n))) == 0
    assert main(generate(model, source, tmp_path / "once", "--n", "4")) == 0
    for name in ("prompts.jsonl", "answers.jsonl"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    assert len({row["output"] for row in records(tmp_path / "once", "answers")}) > 8
    assert_one_line_error(generate(model, source, tmp_path / "once", "--n", "2"), "--n: ", capsys)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--seed=7"], "seed: 42 before, 7 now"),
        (["--temperature=0.7"], "temperature: 1.5 before, 0.7 now"),
        (["--limit", "2"], "prompts: 4 before, 2 now"),
        (["--max_new_tokens=5"], "max_new_tokens"),
    ],
)
def test_files_of_other_settings_do_not_mix(model, tmp_path, capsys, changed, named):
    source = prompts_file(tmp_path)
    assert main(generate(model, source, tmp_path / "out")) == 0
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert_one_line_error(generate(model, source, tmp_path / "out", *changed), named, capsys)
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before
    capsys.readouterr()


def test_another_model_does_not_mix(model, tmp_path, capsys):
    source = prompts_file(tmp_path)
    assert main(generate(model, source, tmp_path / "out")) == 0
    other = save_model(tmp_path / "other", seed=1)
    assert_one_line_error(generate(other, source, tmp_path / "out"), "model_fingerprint", capsys)


def asked(model: str, tmp_path: Path, rows: list[dict[str, Any]], *more: str) -> list[str]:
    """The prompts that reach the model, as text."""
    source = prompts_file(tmp_path, rows)
    assert main(generate(model, source, tmp_path / "out", *more)) == 0
    return [TOKENIZER.decode(row["token_ids"]) for row in records(tmp_path / "out", "prompts")]


def test_system_text_and_earlier_turns_are_asked_too(model, tmp_path):
    turns = [
        {"role": "system", "content": "Be wet"},
        {"role": "user", "content": "yes"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "water"},
    ]
    judged = [*turns, {"role": "assistant", "content": "Paris"}]
    worse = [*turns, {"role": "assistant", "content": "maybe"}]
    rows = [
        {"prompt": turns},
        {"prompt": "water", "system": "Be wet"},
        {"prompt": "water", "chosen": judged, "rejected": worse},
    ]
    files = [asked(model, tmp_path / str(i), [row])[0] for i, row in enumerate(rows)]
    assert files[0] == files[2]
    for text in files:
        assert "Be wet" in text
        assert text.count(str(TOKENIZER.bos_token)) == 1
    assert "no" in files[0]
    (text,) = asked(model, tmp_path / "set", [{"prompt": "water"}], '--system_prompt="Be dry"')
    assert "Be dry" in text


def test_plain_text_pairs_are_continued_as_plain_text_with_one_bos(model, tmp_path):
    row = {"prompt": "User: water Assistant:", "chosen": " yes", "rejected": " no"}
    (text,) = asked(model, tmp_path, [row])
    assert text.replace(" ", "") == f"{TOKENIZER.bos_token}User:waterAssistant:".replace(" ", "")


def test_an_answer_may_be_missing_beside_its_prompt(model, tmp_path):
    """A file that is judged in part, or with ties: its other rows are prompts all the same."""
    rows = [
        {"prompt": "water", "chosen": " yes", "rejected": " no"},
        {"prompt": "wet", "chosen": None, "rejected": " no"},
        {"prompt": "dry", "chosen": None, "rejected": None},
        {"prompt": "yes", "chosen": " no", "rejected": " no"},
        {"prompt": "no", "chosen": " no", "rejected": ""},
    ]
    assert len(asked(model, tmp_path, rows)) == 5


def test_a_prompt_that_repeats_is_answered_once_and_bad_rows_are_said(model, tmp_path, capsys):
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("yes", "no", "yes")]
    assert len(asked(model, tmp_path, [*rows, {"prompt": begun}, {"prompt": None}])) == 2
    printed = capsys.readouterr().out
    assert "1 rows repeat a prompt, which is answered once" in printed
    assert "left out: 1 rows, prompt that begins an answer" in printed
    assert "left out: 1 rows, missing value" in printed


TALK = [{"role": "user", "content": "water"}, {"role": "assistant", "content": "wet"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": [{"from": "human", "value": "water"}, {"from": "gpt", "value": "wet"}]},
        {"messages": TALK, "rejected_response": "dry"},
        {"query": "water", "response": "wet"},
        {"prompt": "water", "chosen": "wet"},
        {"query": "water", "responses": ["wet", "dry"], "scores": [1, 1]},
        {"conversation_a": TALK, "conversation_b": TALK, "winner": "tie"},
        {"context": TALK[:1], "response1": "a", "response2": "b", "overall_preference": 0},
        {"history": "water", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
    ],
    ids=lambda row: "-".join(row),
)
def test_answers_of_a_row_count_for_nothing(row):
    """Neither the one that a talk ends with, nor a tie of two."""
    assert [prompt.content for prompt in read_prompts([row], None, [], None)[0]] == [TALK[:1]]


@pytest.mark.parametrize("row", [{"problem": "1 + 1"}, {"prompt_ids": [5], "chosen_ids": [6]}])
def test_a_row_whose_prompt_nobody_knows_is_told_how_to_name_it(row):
    with pytest.raises(UserError, match="rename the prompt's column to prompt; found p"):
        read_prompts([row], None, [], None)


@pytest.mark.parametrize("talk", [["water", "wet"], TALK[1:], [], None])
def test_a_row_of_something_else_than_messages_is_left_out(talk):
    with pytest.raises(UserError, match="left out: 1 rows"):
        read_prompts([{"conversations": talk}], None, [], None)


def test_a_template_that_loses_text_is_said(model, tmp_path, capsys):
    deaf = "--chat_template={{ bos_token }}{{ messages[-1].content }}"
    turns = [{"role": "system", "content": "Be wet"}, {"role": "user", "content": "yes"}]
    source = prompts_file(tmp_path, [{"prompt": turns}])
    command = generate(model, source, tmp_path / "out", deaf)
    assert_one_line_error(command, "left out by the chat template", capsys)


def test_a_prompt_that_fills_the_context_gets_no_answer(tmp_path, capsys):
    short = save_model(tmp_path / "m", max_position_embeddings=40)
    rows = [{"prompt": [{"role": "user", "content": "yes " * n}]} for n in (1, 60)]
    assert main(generate(short, prompts_file(tmp_path, rows), tmp_path / "out")) == 0
    finishes = [row["finish"] for row in records(tmp_path / "out", "answers")]
    assert finishes.count("prompt too long") == 2
    assert "prompt too long: 2 of 4" in capsys.readouterr().out


def test_prompts_with_images_are_refused(tmp_path):
    """Rows with parts of type image and no column are left out."""
    image_pairs(2).to_parquet(tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match="has images"):
        open_prompts(str(tmp_path / "pairs.parquet"), None)
    rows = [{"prompt": row["prompt"]} for row in image_rows(1)] + [{"prompt": [user("Well?")]}]
    prompts, lines = read_prompts(rows, None, [], None)
    assert len(prompts) == 1
    assert "content that is not text" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temperature=0"], "temperature: set it above 0"),
        (["--n", "0"], "--n"),
        (["--limit", "0"], "--limit"),
        (["--temprature=1"], "temperature"),
        (["--split", "test", "--chat_template=nothing"], "chat_template"),
        (["--server_url=ftp://x"], "--server-url"),
        (["--server_url=http://x/v1", "--top_k=3"], "top_k: leave it out"),
    ],
)
def test_bad_arguments(model, tmp_path, capsys, arguments, named):
    command = generate(model, prompts_file(tmp_path), tmp_path / "out", *arguments)
    assert_one_line_error(command, named, capsys)


def test_a_split_must_be_told_where_it_is_unclear(model, tmp_path, capsys):
    folder = tmp_path / "data"
    for name in ("dev", "test"):
        prompts_file(folder, name=f"{name}.jsonl")
    command = generate(model, str(folder), tmp_path / "out")
    assert_one_line_error(command, "--split: name one of", capsys)
    assert main([*command, "--split", "test"]) == 0


def echo(body: dict[str, Any], _: int) -> tuple[int, bytes]:
    """Says the last message and the seed."""
    text = f"{body['messages'][-1]['content']} {body['seed']}"
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return 200, json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()


def test_a_server_gets_messages_settings_and_a_seed_for_each_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = prompts_file(tmp_path)
    with chat_endpoint(echo) as (url, seen):
        command = generate("served", source, tmp_path / "out", f"--server_url={url}")
        assert main(command) == 0
        assert main(command) == 0  # nothing is asked twice
    assert len(seen) == 8
    assert len({body["seed"] for body in seen}) == 8
    assert {body["model"] for body in seen} == {"served"}
    assert {body["temperature"] for body in seen} == {1.5}
    assert {body["max_tokens"] for body in seen} == {6}
    made = records(tmp_path / "out", "answers")
    assert {row["tokens"] for row in made} == {3}
    assert {row["token_ids"] for row in made} == {None}
    for row in made:
        assert int(row["output"].split()[-1]) == answering.seed_of(42, row["id"])


def test_a_server_that_dies_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = prompts_file(tmp_path)
    up = []

    def dies(body, number):
        return echo(body, number) if number < 4 or up else (401, b"no")

    with chat_endpoint(dies) as (url, _):
        command = generate("m", source, tmp_path / "out", f"--server_url={url}", "--batch_size=2")
        assert_one_line_error(command, "HTTP 401", capsys)
        assert len(records(tmp_path / "out", "answers")) == 4
        up.append(True)
        assert main(command) == 0
    made = records(tmp_path / "out", "answers")
    assert len({row["id"] for row in made}) == len(made) == 8


def test_alike_answers_of_a_server_without_seeds_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = prompts_file(tmp_path)
    with chat_endpoint(lambda body, n: echo(body | {"seed": 0}, n)) as (url, _):
        assert main(generate("m", source, tmp_path / "out", f"--server_url={url}")) == 0
    assert f"all the same: {FOUR} of {FOUR}" in capsys.readouterr().out
