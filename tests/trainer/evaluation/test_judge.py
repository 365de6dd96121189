"""Judges: the client's retries and errors against a server on loopback, win rates, the tools."""

from __future__ import annotations

import json
import threading

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation import benchmarks, judging
from widemargin.trainer.evaluation.chat_client import ChatClient, Unusable, text_of
from widemargin.trainer.evaluation.questions import alpaca_outputs, alpaca_questions

from tests.support.eval_files import chat_endpoint, said, save_alpaca, save_arena
from tests.trainer.test_cli import assert_one_line_error

KEY = "sk-very-secret-0123"
A = said('{"verdict": "A"}')


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def client(url: str, **options) -> ChatClient:
    return ChatClient("m", url, **{"first_wait_s": 0.001, "timeout_s": 5.0, **options})


def ask(judge: ChatClient) -> float:
    return judge.ask(
        [{"role": "user", "content": "?"}], lambda it: judging.parse_verdict(text_of(it))
    )


TROUBLE = {
    "429": (429, b'{"error": "slow down"}'),
    "500": (500, b"oops"),
    "not JSON": (200, b"<html>"),
    "no choices": (200, b'{"choices": []}'),
    "no text": (200, b'{"choices": [{"message": {"content": null}}]}'),
    "no verdict": (200, said("I like both!")),
    "two verdicts": (200, said('{"verdict": "A"} or {"verdict": "B"}')),
    "other verdict": (200, said('{"verdict": "C"}')),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_passing_trouble_is_tried_again(kind):
    with chat_endpoint(lambda _, n: TROUBLE[kind] if n < 3 else (200, A)) as (url, seen):
        assert ask(client(url)) == 1.0
    assert len(seen) == 4
    assert seen[0]["path"] == "/v1/chat/completions"
    assert seen[0]["key"] == f"Bearer {KEY}"
    assert seen[0]["model"] == "m"


@pytest.mark.parametrize("kind", TROUBLE)
def test_lasting_trouble_is_an_error_that_tells(kind):
    with (
        chat_endpoint(lambda _, n: TROUBLE[kind]) as (url, seen),
        pytest.raises(UserError, match="3 attempts failed"),
    ):
        ask(client(url, attempts=3))
    assert len(seen) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 307])
def test_what_will_not_pass_is_told_at_once_without_the_key(status):
    body = f"bad key {KEY}\x1b[31m".encode()
    with (
        chat_endpoint(lambda _, n: (status, body)) as (url, seen),
        pytest.raises(UserError, match=f"HTTP {status}") as refused,
    ):
        ask(client(url))
    assert len(seen) == 1  # no redirect took the key elsewhere
    assert KEY not in str(refused.value)
    assert "\x1b" not in str(refused.value)


def test_a_model_without_temperature_is_asked_without():
    refusal = b"Unsupported value: 'temperature' does not support 0 with this model."

    def reasons(body, _):
        return (400, refusal) if "temperature" in body else (200, A)

    with chat_endpoint(reasons) as (url, seen):
        judge = client(url)
        assert ask(judge) == ask(judge) == 1.0
    assert ["temperature" in body for body in seen] == [True, False, False]


def test_timeouts_and_nobody_there():
    answered = threading.Event()

    def slow(_, n):
        if n == 0:
            answered.wait(30)
        return 200, A

    with chat_endpoint(slow) as (url, seen):
        assert ask(client(url, timeout_s=0.5)) == 1.0
        answered.set()
    assert len(seen) == 2
    with pytest.raises(UserError, match="2 attempts failed"):
        ask(client(url, attempts=2))


def test_retry_after_is_heard(monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    with chat_endpoint(lambda _, n: TROUBLE["429"] if n < 4 else (200, A)) as (url, _):
        assert ask(client(url, first_wait_s=1.0, longest_wait_s=3.0)) == 1.0
    assert waits == [1.0, 2.0, 3.0, 3.0]


def test_no_key_is_no_header(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with chat_endpoint(lambda _, n: (200, A)) as (url, seen):
        ask(client(url))
    assert seen[0]["key"] is None


@pytest.mark.parametrize("url", ["ftp://x/v1", "host/v1", "", "https://me:pw@x/v1"])
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="--judge-url"):
        ChatClient("m", url)


def test_an_empty_address_is_not_openai():
    with pytest.raises(UserError, match="--judge-url: expected an address"):
        judging.JudgeRequest("judge", "").client()


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"verdict": "A"}', 1),
        ('so: {"verdict":"tie"}.', 0.5),
        ('```\n{ "verdict" : "b" }\n```', 0),
    ],
)
def test_verdicts(text, score):
    assert judging.parse_verdict(text) == score


def test_half_a_verdict_is_none():
    with pytest.raises(Unusable):
        judging.parse_verdict('{"verdict": "A"')


@pytest.fixture
def answered(tmp_path):
    """Judges five answers against a baseline's four, in the folder ``out``."""
    questions = alpaca_questions(save_alpaca(tmp_path / "q.json", 5))
    texts = ["good", "bad", "good", "", "good"]
    records = [{"id": q.id, "output": t} for q, t in zip(questions, texts, strict=True)]
    baseline = tmp_path / "baseline.json"
    others = ["bad", "good", "<b>fine</b>", "fine"]
    rows = [{"instruction": q.prompt, "output": t} for q, t in zip(questions, others, strict=False)]
    baseline.write_text(json.dumps(rows))
    out = tmp_path / "out"
    out.mkdir()

    def judge(url: str, **options):
        request = judging.JudgeRequest("m", url, str(baseline), 3, first_wait_s=0.001, **options)
        request.check(alpaca_outputs)
        return judging.judge(request, out, questions, records, alpaca_outputs, "AlpacaEval 2")

    return judge


def fair(body, _):
    """Prefers "good"; says tie to anything else but "bad"."""
    shown = json.loads(body["messages"][1]["content"])
    rank = {"good": 2, "bad": 0}
    a, b = rank.get(shown["answer_a"], 2), rank.get(shown["answer_b"], 2)
    return 200, said(json.dumps({"verdict": "tie" if a == b else "A" if a > b else "B"}))


def test_a_win_rate_in_both_orders(answered, tmp_path, capsys):
    with chat_endpoint(fair) as (url, seen):
        result = answered(url)
    # of four with a baseline: won, lost, tied, and lost by an empty answer that nobody judged
    assert (result["questions"], result["wins"], result["ties"], result["losses"]) == (4, 1, 1, 2)
    assert result["win_rate"] == pytest.approx(100 * 1.5 / 4)
    assert result["same_verdict_in_both_orders"] == 1.0
    assert len(seen) == 6
    assert all(body["messages"][0]["content"] == judging.INSTRUCTIONS for body in seen)
    printed = capsys.readouterr().out
    assert "4 of 5 questions have a baseline answer" in printed
    assert "Not AlpacaEval 2's own number" in printed
    assert json.loads((tmp_path / "out" / "judgment.json").read_text()) == result


def test_a_judge_that_likes_the_first_place_gives_half(answered):
    with chat_endpoint(lambda _, n: (200, A)) as (url, _):
        result = answered(url)
    assert result["same_verdict_in_both_orders"] == pytest.approx(0.25)
    assert result["win_rate"] == pytest.approx(100 * (3 * 0.5 + 0) / 4)


def test_what_is_judged_is_kept(answered, tmp_path):
    down = []

    def breaks(body, number):
        if number >= 3 and not down:
            return 500, b""
        return fair(body, number)

    with chat_endpoint(breaks) as (url, seen):
        with pytest.raises(UserError, match="attempts failed"):
            answered(url)
        lines = (tmp_path / "out" / "judgments.jsonl").read_text().splitlines()
        kept = {json.loads(line)["id"] for line in lines}
        down.append("no more")
        before = len(seen)
        result = answered(url)
    asked = {f"{question}:{place}" for question in "012" for place in "AB"}
    assert len(kept & asked) == 3
    assert len(seen) - before == 3
    assert result["win_rate"] == pytest.approx(37.5)


def test_a_question_that_the_judge_refuses_is_left_out(answered, monkeypatch, capsys):
    refused = []

    def filters(body, number):
        if json.loads(body["messages"][1]["content"])["answer_b"] == "<b>fine</b>" and not refused:
            return TROUBLE["no text"]
        return fair(body, number)

    with chat_endpoint(filters) as (url, _):
        with pytest.raises(UserError, match="a completion without text"):
            answered(url)
        monkeypatch.setattr(judging, "MOST_WITHOUT_VERDICT", 0.2)
        result = answered(url)
        assert "1 of 8 games have no verdict" in capsys.readouterr().out
        assert (result["questions"], result["win_rate"]) == (3, pytest.approx(100 / 3))
        refused.append("no more")
        assert answered(url)["questions"] == 4


def test_another_judge_is_refused_and_a_useless_baseline_too(answered, tmp_path):
    with chat_endpoint(fair) as (url, _):
        answered(url)
        with pytest.raises(UserError, match="url: "):
            answered(url.replace("127.0.0.1", "localhost"))
    (tmp_path / "baseline.json").write_text('[{"instruction": "other", "output": "x"}]')
    with pytest.raises(UserError, match="answers none"):
        answered(url)


def test_the_commands_judge_what_they_answered(tmp_path, monkeypatch, capsys):
    from widemargin.trainer.cli import main

    def answers(questions, *_):
        made = {"output": "good", "tokens": 1, "finish": "stop", "tstamp": 1.0}
        return [{"id": question.id, **made} for question in questions]

    monkeypatch.setattr(benchmarks, "answer", answers)
    baseline = tmp_path / "b.jsonl"
    message = {"messages": [{}, {"role": "assistant", "content": {"answer": "bad"}}]}
    baseline.write_text("".join(json.dumps({"uid": u, **message}) + "\n" for u in ("u1", "u2")))
    command = ["evaluate", "arena-hard", "--model", "m", "--out", str(tmp_path / "out")]
    command += ["--questions", save_arena(tmp_path / "q.jsonl", 2)]
    judge = ["--judge-model", "j", "--baseline", str(baseline), "--judge-url"]
    with chat_endpoint(fair) as (url, seen):
        assert main([*command, *judge, url]) == 0
        assert len(seen) == 4
        assert_one_line_error([*command, "--judge-url", url], "api_config", capsys)
        assert_one_line_error([*command, *judge[2:4]], "--baseline: Arena-Hard", capsys)
    assert json.loads((tmp_path / "out" / "judgment.json").read_text())["win_rate"] == 100
    assert KEY not in "".join(
        path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert_one_line_error([*command, "--arena-hard-dir", str(tmp_path)], "gen_judgment", capsys)
