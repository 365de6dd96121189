"""Positions that are not scored leave ``select`` and ``targets``, in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.packing.collator import PairCollator

ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6, 7],
     "chosen_unscored": [1], "rejected_unscored": [0]},
    {"prompt_ids": [1], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12],
     "chosen_unscored": [], "rejected_unscored": [0, 2]},
]  # fmt: skip
LAYOUTS: list[dict[str, Any]] = [
    {"layout": layout, "rows": rows}
    for layout, rows in [
        ("padded", "dense"), ("packed", "dense"), ("packed", "varlen"),
        ("prefix_shared", "dense"), ("prefix_shared", "varlen"), ("prefix_shared", "blocks"),
    ]
]  # fmt: skip


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: f"{o['layout']}-{o['rows']}")
def test_what_is_left_is_predicted_from_where_it_was(options: dict[str, Any]) -> None:
    rows = PairRows(Dataset.from_list(ROWS))
    batch = PairCollator(0, **options)(rows.__getitems__([0, 1]))
    everything = PairCollator(0, **options)(
        [{k: v for k, v in row.items() if "unscored" not in k} for row in ROWS]
    )
    keep = torch.tensor([1, 0, 1, 1, 1, 0, 1, 0, 1, 0], dtype=torch.bool)
    assert torch.equal(batch["input_ids"], everything["input_ids"])
    assert batch["targets"].tolist() == [3, 5, 8, 9, 7, 11]
    assert torch.equal(batch["select"], everything["select"][keep])
    assert batch["cu_seqlens"].tolist() == [0, 2, 4, 5, 6]
    assert batch["cu_seqlens"].dtype == everything["cu_seqlens"].dtype
    assert rows.scored.chosen.tolist() == [2, 2]
    assert rows.scored.rejected.tolist() == [1, 1]
    assert rows.lengths.chosen.tolist() == [3, 2]
