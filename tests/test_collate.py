"""Batches of pairs, and the preflight that shows one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny_tokenizer
from widemargin.trainer.data import PairCollator, preflight_lines

ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [0, 5, 6], "chosen_ids": [7, 3], "rejected_ids": [8, 9, 3], "pair_id": 11},
    {"prompt_ids": [0], "chosen_ids": [7], "rejected_ids": [8, 3], "pair_id": -1},
]


def test_layout() -> None:
    batch = PairCollator(pad_token_id=2)(ROWS)
    assert batch["input_ids"].tolist() == [
        [0, 5, 6, 7, 3, 2],
        [0, 7, 2, 2, 2, 2],
        [0, 5, 6, 8, 9, 3],
        [0, 8, 3, 2, 2, 2],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 6, 3]
    assert batch["targets"].tolist() == [7, 3, 7, 8, 9, 3, 8, 3]
    assert batch["select"].tolist() == [2, 3, 6, 14, 15, 16, 18, 19]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 6, 8]
    assert batch["pair_ids"].tolist() == [11, -1]
    types = {name: tensor.dtype for name, tensor in batch.items()}
    assert types.pop("cu_seqlens") == torch.int32
    assert set(types.values()) == {torch.int64}


def test_rows_without_an_id_are_numbered_in_the_batch() -> None:
    rows = [{k: v for k, v in row.items() if k != "pair_id"} for row in ROWS]
    assert PairCollator(2)(rows)["pair_ids"].tolist() == [0, 1]


TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=9)
PAIRS = st.lists(
    st.fixed_dictionaries(dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), TOKENS)),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(rows=PAIRS, multiple=st.sampled_from([None, 1, 8]))
def test_every_completion_token_is_the_target_of_the_position_before_it(
    rows: list[dict[str, list[int]]], multiple: int | None
) -> None:
    batch = PairCollator(0, padded_to_multiple_of=multiple)(rows)
    assert batch["input_ids"].shape[1] % (multiple or 1) == 0
    following = batch["input_ids"].flatten().roll(-1)
    assert torch.equal(following[batch["select"]], batch["targets"])
    bounds = batch["cu_seqlens"].tolist()
    pieces = [batch["targets"][a:b].tolist() for a, b in pairwise(bounds)]
    sides = ("chosen_ids", "rejected_ids")
    assert pieces == [row[side] for side in sides for row in rows]
    width = batch["input_ids"].shape[1]
    first = batch["select"][batch["cu_seqlens"][:-1].long()] - torch.arange(2 * len(rows)) * width
    assert first.tolist() == [len(row["prompt_ids"]) - 1 for row in rows] * 2


def test_preflight_shows_roles_and_counts() -> None:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("Is water wet?")["input_ids"]
    row = {"prompt_ids": prompt, "chosen_ids": [3], "rejected_ids": [5, 3]}
    lines = preflight_lines(row, tokenizer)
    assert lines[0] == (
        f"first pair: prompt {len(prompt)} tokens (read, not scored), chosen 1 tokens (scored), "
        "rejected 2 tokens (scored)"
    )
    assert lines[1] == "BOS '<s>' in the prompt: 1"
    assert lines[2].startswith(f"completions start at position {len(prompt)}, after")
    assert lines[4].split() == ["prompt", "0", "0", "-", "special", "'<s>'"]
    last = ["rejected", str(len(prompt) + 1), "3", "yes", "special", "'<|end|>'"]
    assert lines[-1].split() == last
    assert len(lines) == 4 + len(prompt) + 3


def test_preflight_leaves_out_the_middle_of_long_parts() -> None:
    row = {"prompt_ids": [0] * 50, "chosen_ids": [3] * 4, "rejected_ids": [3] * 5}
    lines = preflight_lines(row, tiny_tokenizer(), most_tokens=4)
    assert [line.split()[1] for line in lines[4:9]] == ["0", "1", "...", "48", "49"]
    assert "46 more tokens" in lines[6]
    assert len(lines) == 4 + 5 + 4 + 5


@pytest.mark.parametrize("text", ["\x1b[31mred\r\n", "‮tfel", "\x00\x07", "é€"])
def test_preflight_cannot_steer_a_terminal(text: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    for line in preflight_lines(
        {"prompt_ids": ids, "chosen_ids": [3], "rejected_ids": [5]}, tokenizer
    ):
        assert line.isprintable()
