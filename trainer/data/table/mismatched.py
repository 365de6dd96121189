"""Answers of a micro-batch after other prompts than their own, by which KTO estimates a KL.

Every prompt is given the answer of a neighbour: the one before it, in the data's order, among the
rows of the global micro-batch that have another prompt. So ranks change nothing, and neither the
order of the data nor the size of a batch matters. A micro-batch of one prompt alone looks for the
neighbour in the whole data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ...errors import UserError
from ..images.processor import IMAGES
from .columns import TOKEN_COLUMNS, UNSCORED_COLUMNS

IDS, UNSCORED, LEAF = "mismatched_ids", "mismatched_unscored", "mismatched_leaf"
"""What a row has of its neighbour's answer: its tokens, and the number of that leaf."""


def neighbours(together: Sequence[int], prompts: np.ndarray) -> dict[int, int]:
    """The neighbour of each row of a global micro-batch.

    Args:
        prompts: [rows of the data set] a number for every prompt.
    """
    order = sorted(together)
    found = {}
    for place, row in enumerate(order):
        before = chain(reversed(order[:place]), reversed(order[place + 1 :]))
        anywhere = ((row - 1 - i) % len(prompts) for i in range(len(prompts)))
        others = (other for other in chain(before, anywhere) if prompts[other] != prompts[row])
        found[row] = next(others, -1)
        if found[row] < 0:
            raise UserError(
                "kl_estimate: set it to batch, or give answers to more prompts; all of these "
                "answer one, so there is no mismatched answer"
            )
    return found


def exchanged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the neighbour's answer in place of their own, in the trees of their prompts.

    Rows of one prompt that have one neighbour share a leaf. Leaves have numbers below 0, which no
    row's own answer has.
    """
    leaves: dict[tuple[int, int], int] = {}
    prompt, *sides = TOKEN_COLUMNS
    return [
        {
            prompt: row[prompt],
            **dict.fromkeys(sides, row[IDS]),
            **{name: row[name] for name in (IMAGES, "tree_id") if name in row},
            **({} if UNSCORED not in row else dict.fromkeys(UNSCORED_COLUMNS, row[UNSCORED])),
            "leaf_ids": [leaves.setdefault((row["tree_id"], row[LEAF]), ~len(leaves))] * 2,
        }
        for row in rows
    ]


def with_exchanged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their own answers, and then `exchanged`: every prompt has both behind it."""
    others = exchanged(rows)
    return [{name: row[name] for name in others[0]} for row in rows] + others
