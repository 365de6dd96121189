"""Batches of pairs in every layout."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.errors import UserError
from widemargin.trainer.packing import PairCollator

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
    assert batch["num_tokens"].tolist() == [5 + 6]  # the other pair is a filler


def test_packed_layout() -> None:
    batch = PairCollator(2, layout="packed", area_cost=1e-9)(ROWS)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 8, 9, 3, 0, 7], [0, 5, 6, 7, 3, 0, 8, 3]]
    assert batch["segment_ids"].tolist() == [[2] * 6 + [1] * 2, [0] * 5 + [3] * 3]
    assert batch["position_ids"].tolist() == [[*range(6), *range(2)], [*range(5), *range(3)]]
    assert batch["select"].tolist() == [10, 11, 6, 2, 3, 4, 13, 14]
    assert batch["decoder_tokens"].tolist() == [16, 16, 24]
    short = PairCollator(2, layout="packed", area_cost=10.0)(ROWS)
    assert short["input_ids"].shape == (3, 6)
    assert (short["segment_ids"] == -1).sum() == 2
    assert short["decoder_tokens"].tolist() == [18, 16, 24]


@pytest.mark.parametrize(("layout", "kind"), LAYOUTS)
def test_prompts_are_scored_once_after_the_completions(layout: Any, kind: Any) -> None:
    shared = {"tree_id": 0, "prompt_ids": [0, 5, 6]}
    answers = {"chosen_ids": [7], "rejected_ids": [8]}
    rows = [
        shared | {"chosen_ids": [7, 3], "rejected_ids": [8, 9, 3], "leaf_ids": [0, 1]},
        shared | {"chosen_ids": [7, 3], "rejected_ids": [9], "leaf_ids": [0, 2]},
        answers | {"tree_id": 1, "prompt_ids": [4], "leaf_ids": [3, 4]},
        answers | {"tree_id": 2, "prompt_ids": [1, 2], "leaf_ids": [5, 6]},
    ]
    collator = PairCollator(2, layout=layout, rows=kind)
    plain = collator(rows)
    collator.scores_prompts = True
    batch = collator(rows)
    count = len(plain["targets"])
    assert batch["prompt_cu_seqlens"].tolist() == [0, count, count + 2, count + 2, count + 3]
    assert batch["prompts"].tolist() == [0, 0, 1, 2]
    assert batch["targets"][count:].tolist() == [5, 6, 2]
    following = batch["input_ids"].flatten()[batch["select"][count:] + 1]
    assert torch.equal(following, batch["targets"][count:])
    for name, value in plain.items():
        found = batch[name] if name not in ("targets", "select") else batch[name][:count]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    assert "prompts" not in plain


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
@given(rows=PAIRS)
def test_every_completion_token_is_the_target_of_the_position_before_it(
    rows: list[dict[str, list[int]]],
) -> None:
    batch = PairCollator(0)(rows)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id: give a token's id.*got None"),
        ({"layout": "auto"}, "layout: expected one of padded, packed, prefix_shared, got 'auto'"),
        ({"rows": "mask"}, "rows: expected one of dense, blocks, varlen, got 'mask'"),
    ],
)
def test_arguments_that_make_no_batch(arguments, message):
    with pytest.raises(UserError, match=message):
        PairCollator(**({"pad_token_id": 0} | arguments))


@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
def test_rows_that_make_no_batch(layout):
    """Without a prompt an answer's first token would be predicted by another row's last one."""
    collate = PairCollator(0, layout=layout)
    with pytest.raises(
        UserError, match=r"rows: tokenize them first.* got prompt, chosen, rejected"
    ):
        collate([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    pair = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    with pytest.raises(UserError, match="prompt_ids: give one token at least"):
        collate([pair, pair | {"prompt_ids": []}])
