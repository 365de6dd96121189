"""The benchmarks on hidden states of a model: routing's work, and what AdamW makes of its error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.head import active, adamw, command
from bench.head.table import active_table, adamw_table
from tests.support.tiny_models import tiny_model, tiny_pairs
from tests.support.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("inputs")
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    tiny_pairs(24).to_json(folder / "pairs.jsonl")
    return ["--model", str(folder / "tiny"), "--pairs", str(folder / "pairs.jsonl")]


def test_a_larger_bound_computes_less_and_errs_more(inputs, tmp_path):
    out = tmp_path / "active.json"
    assert active.main([*inputs, "--rows=4", "--sharpen", "1", "8", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {(row["case"], row["form"]) for row in rows} == {
        (case, form) for case in ("tiny", "tiny, logits x 8") for form in ("pairs", "cells")
    }
    for case in ("tiny", "tiny, logits x 8"):
        pairs = [row for row in rows if row["case"] == case and row["form"] == "pairs"]
        work = [row["active_fraction"] for row in sorted(pairs, key=lambda row: row["tail_eps"])]
        assert work == sorted(work, reverse=True)
    assert len(active_table(rows).splitlines()) == 2 + 4
    assert out.with_suffix(".png").is_file()


def test_written_states_are_cases_of_the_head_s_benchmark(inputs, tmp_path):
    states, out = tmp_path / "tiny.pt", tmp_path / "head.json"
    assert active.main([*inputs, "--rows=2", "--write-states", str(states)]) == 0
    measured = ["--states", str(states), "--providers", "full-logits", "widemargin-torch-exact"]
    assert command.main([*measured, "--repeats=1", "--no-memory", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["tiny"] * 2 + ["tiny, logits x 2"] * 2
    assert {(row["dtype"], row["distribution"], row["gate"]) for row in rows} == {
        ("bfloat16", "real", "passed")
    }
    assert rows[2]["entropy"] < rows[0]["entropy"]


def test_an_unknown_case_is_an_error(capsys):
    with pytest.raises(SystemExit):
        command.main(["--case", "cpu-flatt"])
    assert "no case cpu-flatt; known: tiny, cpu," in capsys.readouterr().err


def test_adamw_s_distance_shrinks_with_the_bound(inputs, tmp_path):
    out = tmp_path / "adamw.json"
    small = ["--rows=2", "--timed-rows=2", "--repeats=1", "--exponents", "-3", "-9"]
    assert adamw.main([*inputs, *small, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    far, near, *_ = (row["distance"]["all"] for row in rows if row["tops"] and row["tail_eps"])
    assert far >= near
    (bf16,) = (row for row in rows if row["autocast"])
    assert bf16["distance"]["all"] > 0
    (exact,) = (row for row in rows if not row["tail_eps"] and not row["autocast"])
    assert exact["errors"]["dhidden"] < 1e-5
    assert all(row["sharpened"]["times_full_logits"] > 0 for row in rows if "errors" in row)
    assert len(adamw_table(rows).splitlines()) == 2 + len(rows)
