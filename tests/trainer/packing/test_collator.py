"""Batches of pairs, and the preflight that shows one."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.data import PairCollator, preflight_lines
from widemargin.trainer.packing.layout import dense_cost, place_dense, row_length

from tests.support.tiny_tokenizers import tiny_tokenizer

LAYOUTS: list[tuple[Any, Any]] = [
    ("padded", "dense"),
    *product(("packed", "prefix_shared"), ("dense", "blocks", "varlen")),
]
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


def test_prefix_shared_layout() -> None:
    batch = PairCollator(2, layout="prefix_shared", rows="varlen")(ROWS)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7, 3, 8, 9, 3, 0, 7, 8, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1, 2]]
    assert batch["segment_ids"].tolist() == [[0] * 8 + [1] * 4]
    assert batch["branch_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 2, 2]]
    assert batch["select"].tolist() == [2, 3, 8, 2, 5, 6, 8, 10]
    assert batch["targets"].tolist() == [7, 3, 7, 8, 9, 3, 8, 3]
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 8, 10, 12]
    assert batch["cu_seq_lens_k"].tolist() == [0, 5, 11, 13, 16]
    assert (batch["max_length_q"], batch["max_length_k"]) == (5, 6)
    assert batch["kv_index"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 8, 10, 11]
    assert batch["decoder_tokens"].tolist() == [12, 12, 24]


def test_packed_layout() -> None:
    batch = PairCollator(2, layout="packed", area_cost=1e-9)(ROWS)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 8, 9, 3, 0, 7], [0, 5, 6, 7, 3, 0, 8, 3]]
    assert batch["segment_ids"].tolist() == [[2] * 6 + [1] * 2, [0] * 5 + [3] * 3]
    assert batch["position_ids"].tolist() == [[*range(6), *range(2)], [*range(5), *range(3)]]
    assert batch["select"].tolist() == [10, 11, 6, 2, 3, 4, 13, 14]
    assert batch["decoder_tokens"].tolist() == [16, 16, 24]
    rounded = PairCollator(2, 16, layout="packed", area_cost=10.0)(ROWS)
    assert rounded["input_ids"].shape == (1, 16)
    assert rounded["decoder_tokens"].tolist() == [16, 16, 64]


def test_reference_log_probs_of_rows_become_a_tensor() -> None:
    rows = [
        row | {"reference_chosen_logps": -1.0 - i, "reference_rejected_logps": -3.0 - i}
        for i, row in enumerate(ROWS)
    ]
    for layout, kind in LAYOUTS:
        batch = PairCollator(2, layout=layout, rows=kind)(rows)
        assert batch["reference_logps"].dtype == torch.float32
        assert batch["reference_logps"].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert "reference_logps" not in PairCollator(2)(ROWS)


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


@pytest.mark.costly
@settings(deadline=None)
@given(rows=PAIRS, area_cost=st.sampled_from([1e-9, 0.1, 10.0]))
def test_every_layout_scores_the_same_targets_after_the_same_tokens(
    rows: list[dict[str, list[int]]], area_cost: float
) -> None:
    """Before each target stand its own sequence's tokens, told by segment, branch and position."""
    expected = [
        [*row["prompt_ids"], *row[side]][: len(row["prompt_ids"]) + i]
        for side in ("chosen_ids", "rejected_ids")
        for row in rows
        for i in range(len(row[side]))
    ]
    plain = PairCollator(0)(rows)
    for layout, kind in LAYOUTS[1:]:
        batch = PairCollator(0, layout=layout, rows=kind, area_cost=area_cost)(rows)
        for name in ("targets", "cu_seqlens", "pair_ids"):
            assert torch.equal(batch[name], plain[name])
        assert batch["decoder_tokens"][2] == plain["input_ids"].numel()
        assert batch["decoder_tokens"][1] == (batch["segment_ids"] >= 0).sum()
        tokens, segments, branches, positions = (
            batch[n].flatten() for n in ("input_ids", "segment_ids", "branch_ids", "position_ids")
        )
        rejected = torch.repeat_interleave(
            torch.arange(2 * len(rows)) >= len(rows), batch["cu_seqlens"].diff()
        )
        for at, late, context in zip(batch["select"], rejected, expected, strict=True):
            branch = 0 if layout == "packed" else 2 if late else 1
            own = (segments == segments[at]) & ((branches == 0) | (branches == branch))
            own &= positions <= positions[at]
            assert sorted(positions[own].tolist()) == list(range(len(context)))
            assert tokens[own][positions[own].argsort()].tolist() == context


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=9), cost=st.floats(1e-6, 1.0))
def test_dense_rows_hold_every_segment_once_and_cost_least(lengths: list[int], cost: float) -> None:
    sizes = np.array(lengths)
    begins, (count, width) = place_dense(sizes, cost)
    filled = np.zeros(count * width, int)
    for begin, size in zip(begins, sizes, strict=True):
        assert begin // width == (begin + size - 1) // width
        filled[begin : begin + size] += 1
    assert filled.max() == 1
    price = count * width * (1 + cost * width)
    assert price == dense_cost(sizes, cost)
    one, all_alone = sizes.sum(), len(sizes) * sizes.max()
    assert price <= min(one * (1 + cost * one), all_alone * (1 + cost * sizes.max())) + 1e-9


def test_lengths_of_single_rows_are_few() -> None:
    lengths = sorted({row_length(tokens) for tokens in range(1, 40_000, 7)})
    assert all(length % 128 == 0 for length in lengths)
    assert all(b <= max(1.25 * a, a + 128) for a, b in pairwise(lengths))
    assert len({row_length(tokens, 4096) for tokens in range(1, 16_384)}) <= 8


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
