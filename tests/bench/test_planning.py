"""The planning benchmark's own parts: its sample, its numbers, what it prints."""

from __future__ import annotations

import json

import numpy as np

from bench.planning import command, jobs
from bench.planning.table import table


def test_a_sample_of_different_pairs_that_repeats(tmp_path):
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    pair = {
        "prompt": said("user", "Why?"),
        "chosen": said("assistant", "So."),
        "rejected": said("assistant", "No."),
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    rows = command.sample(tmp_path / "pairs.jsonl", 3)
    assert [row["prompt"][0]["content"] for row in rows] == ["0. Why?", "1. Why?", "2. Why?"]
    assert rows == command.sample(tmp_path / "pairs.jsonl", 3)


def test_planning_and_balance_of_given_lengths(tmp_path):
    file = str(tmp_path / "lengths.npy")
    np.save(file, np.random.default_rng(0).integers(20, 500, (3, 700)))
    planned = jobs.million({"lengths_file": file, "lengths": 900})
    assert planned["pairs"] == 900
    assert planned["peak_mib"] > planned["peak_extra_mib"] >= 0
    rows = jobs.balance(file)
    assert len(rows) == 8
    assert all(1 <= row["step"] <= row["worst_step"] <= 1.1 for row in rows)
    rows = [{"case": "balance", "provider": "widemargin", **row} for row in rows]
    rows.append({"case": "million", "provider": "widemargin", **planned})
    rows.append({"case": "prepare", "provider": "trl-dpo", "reason": "not installed"})
    text = table([{**row, "ranks": jobs.RANKS} for row in rows])
    assert "| trl-dpo | – | not installed | – |" in text
    assert "An epoch of 900 pairs for 8 ranks is planned in" in text
    assert text.count("coupled |") == text.count("free |") == 4
