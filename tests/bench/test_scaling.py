"""The scaling curves' own parts, on sizes that say nothing about speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from widemargin.kernels.linear_logprob import TAIL_EPS

from bench.lib.record import read_rows
from bench.lib.subject import STAND_IN, Subject, stand_in
from bench.scaling import curves as scaling
from bench.scaling import plot as scaling_plot
from bench.scaling import ranks as scaling_ranks
from bench.scaling import steps as scaling_steps
from bench.scaling.curves import crossover
from bench.scaling.table import table
from bench.training.data import PairSource, token_rows


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 1400}
    return stand_in(tmp_path_factory.mktemp("subject"), **tiny)


def active_row(provider: str, fraction: float, ms: float) -> dict:
    return {
        "curve": "active", "provider": provider, "entropy": fraction, "distribution": "peaked",
        "tail_eps": TAIL_EPS, "active_fraction": fraction, "total_ms": {"median": ms},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({0.1: 5, 0.5: 9, 0.9: 12}, 0.5 + 0.4 / 3),
        ({0.1: 11, 0.5: 9, 0.9: 11}, 0.7),  # the last crossing counts
        ({0.1: 5, 0.9: 9.9}, None),
        ({0.1: 10, 0.9: 12}, 0.1),
        ({}, None),
    ],
)
def test_where_the_tails_take_the_same_time(times, expected) -> None:
    rows = [active_row("widemargin-torch-mean", at, ms) for at, ms in times.items()]
    rows += [active_row("widemargin-torch-exact", at, 10.0) for at in times]
    found = crossover(rows)
    assert found == (expected if expected is None else pytest.approx(expected))


@pytest.mark.costly
def test_curves_of_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "FACTORS", {"tokens": (0.5, 1), "vocab": (1, 2)})
    monkeypatch.setattr(scaling, "ENTROPIES", (0.5,))
    monkeypatch.setattr(scaling, "FLAT_EPS", (TAIL_EPS, 2**-15))
    out = tmp_path / "scaling_cpu.json"
    arguments = ["--base", "tiny", "--repeats", "1", "--out", str(out), "--allow-dirty"]
    assert scaling.main([*arguments, "--curves", "tokens", "vocab", "active"]) == 0
    rows = read_rows(out)
    tokens = [row for row in rows if row["curve"] == "tokens"]
    assert {row["tokens"] for row in tokens} == {16, 32}
    assert {(row["vocab"], row["hidden_size"]) for row in tokens} == {(1024, 32)}
    full = [row for row in tokens if row["provider"] == "full-logits"]
    peaks = [row["peak_extra_mib"]["allocator"] for row in full]
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.1)
    active = [r for r in rows if r["curve"] == "active" and r["provider"].endswith("mean")]
    fractions = [row["active_fraction"] for row in active]
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.9
    text = table(rows)
    assert "Against tokens N; vocabulary V 1,024, hidden size H 32." in text
    rest = [row for row in rows if row["curve"] == "active"]
    scaling_plot.draw(rest, tmp_path / "rest.png")
    assert (tmp_path / "rest.png").stat().st_size > 10_000


def test_whole_steps_agree_and_prefixes_are_shared(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_steps, "find_subject", lambda folder: subject)
    rows = list(scaling_steps.sequence_rows((48,), repeats=1))
    assert [row["provider"] for row in rows] == list(scaling_steps.LAYOUTS)
    assert all(row["case"] == STAND_IN and row["gate"] == "passed" for row in rows)
    full, padded, shared = (row["computed_tokens"] for row in rows)
    assert full == padded == 4 * 48
    assert shared == 2 * (48 + 18)
    build = scaling_steps.model_builder(subject.model)
    pairs = scaling_steps.pairs_of(list(range(10, 600)), 48)
    gradients = [list(build(name, pairs).run()) for name in scaling_steps.LAYOUTS]
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            assert float((one - two).norm()) <= 1e-2 * float(one.norm()) + 1e-7


def test_the_stand_in_s_pairs_are_as_long_as_chat_answers(subject: Subject) -> None:
    rows = token_rows(PairSource(subject.pairs, subject.model, 50, 1024, False))
    assert len(rows) == 50
    mean = sum(len(row["chosen_ids"]) for row in rows) / len(rows)
    assert 150 < mean < 600
    assert max(max(row["chosen_ids"]) for row in rows) < 1400


def test_plan_s_model_is_given_one_process(subject: Subject) -> None:
    options = scaling_ranks.training_options(subject, steps=1, pairs_per_step=4)
    pairs = scaling_ranks.find_rows(options)
    rates = scaling_ranks.predicted(subject, pairs, options, alone=3.0)
    assert list(rates) == [1, 2, 4]
    assert rates[1] == pytest.approx(3.0)
    assert 3.0 < rates[2] <= 6.0
    assert rates[2] < rates[4] <= 12.0


@pytest.mark.slow
def test_two_processes_are_measured(subject: Subject, tmp_path: Path) -> None:
    options = scaling_ranks.training_options(subject, steps=1, pairs_per_step=2)
    (tmp_path / "rows.json").write_text(json.dumps(scaling_ranks.find_rows(options)))
    found = scaling_ranks.measure(2, options, tmp_path)
    assert found.get("pairs_per_s", 0) > 0, found
