"""What a batch's rows hold, and where: trees of prompts and answers, and places of their tokens."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np

from ..data.table import TOKEN_COLUMNS
from ..data.table.trees import Trees, runs
from ..errors import UserError
from ..settings.names import Layout

Rows = Literal["dense", "blocks", "varlen"]
"""How many rows a packed batch has, by the attention that reads it; `PairCollator` has the details.
"""

BLOCK = 128
"""Tokens of one block of flex attention's masks."""


@dataclass(frozen=True)
class Forest:
    """The trees of a batch's rows: U prompts, S leaves and P edges; see `data.table.trees`."""

    prompts: list[Any]  # [U] tokens each
    completions: list[Any]  # [S]
    leaves: list[tuple[int, int]]  # [S] a row that has it, and of which side
    tree: np.ndarray  # [S]
    branch: np.ndarray  # [S] from 1
    by_tree: np.ndarray  # [S] the order in which sequences lie in a row
    edges: np.ndarray  # [P, 2]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Forest:
        """Rows without ``tree_id`` and ``leaf_ids`` are trees of their own."""
        _check_rows(rows)
        trees = Trees.apart(len(rows))
        if "tree_id" in rows[0]:
            numbers = ([row[name] for row in rows] for name in ("tree_id", "leaf_ids"))
            trees = Trees(*map(np.array, numbers))
        found = trees.sequences()
        pairs, sides = np.divmod(found.first, 2)
        leaves = list(zip(pairs.tolist(), sides.tolist(), strict=True))
        return cls(
            prompts=[rows[leaves[i][0]]["prompt_ids"] for i in np.flatnonzero(found.branch == 1)],
            completions=[rows[pair][TOKEN_COLUMNS[1 + side]] for pair, side in leaves],
            leaves=leaves,
            tree=found.tree,
            branch=found.branch,
            by_tree=found.by_tree,
            edges=found.edges,
        )

    def of_leaves(self, rows: Sequence[Mapping[str, Any]], columns: Any, *missing: Any) -> list:
        """[S] what the rows have of each leaf, in a column for either side."""
        return [rows[pair].get(columns[side], *missing) for pair, side in self.leaves]

    @cached_property
    def starts(self) -> np.ndarray:
        """[U] tokens of the prompts."""
        return np.array([len(part) for part in self.prompts], np.int64)

    @cached_property
    def counts(self) -> np.ndarray:
        """[S] tokens of the completions."""
        return np.array([len(part) for part in self.completions], np.int64)

    @property
    def prompts_again(self) -> np.ndarray:
        """[S] tokens of the prompt before each completion."""
        return self.starts[self.tree]

    @property
    def totals(self) -> np.ndarray:
        """[S] tokens of prompt and completion."""
        return self.prompts_again + self.counts


def check_arguments(pad_token_id: Any, layout: str, rows: str) -> None:
    """Raise ``UserError`` for an argument of `PairCollator` that no batch can be made with."""
    if not isinstance(pad_token_id, Integral):
        raise UserError(
            "pad_token_id: give a token's id, such as tokenizer.eos_token_id where the tokenizer "
            f"has no pad token; got {pad_token_id!r}"
        )
    named = (("layout", layout, get_args(Layout)), ("rows", rows, get_args(Rows)))
    for name, value, known in named:
        if value not in known:
            raise UserError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        if not all(name in row for name in TOKEN_COLUMNS):
            raise UserError(
                "rows: tokenize them first, by widemargin.trainer.data.tokenize_pairs; expected "
                f"{', '.join(TOKEN_COLUMNS)}, got {', '.join(row)}"
            )
        if not len(row[TOKEN_COLUMNS[0]]):
            raise UserError(
                "prompt_ids: give one token at least, such as tokenizer.bos_token_id; without one "
                "nothing predicts an answer's first token"
            )


def place_dense(lengths: np.ndarray, area_cost: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Segments into B rows of T tokens, where attention computes all T² entries of a row's mask.

    Few long rows waste attention, many short ones padding: of every B the cheapest is taken, by
    B·T + area_cost·B·T² with segments dealt longest first to the emptiest row.

    Args:
        lengths: [S] tokens of each segment.
        area_cost: of one entry, in tokens through the decoder.

    Returns:
        The flat beginning in [B·T] of every segment [S], and (B, T).
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    best: tuple[float, list[tuple[int, int]], tuple[int, int]] | None = None
    for count in range(1, len(sizes) + 1):
        places, width = _deal(order, sizes, count)
        cost = count * width * (1 + area_cost * width)
        if best is None or cost < best[0]:
            best = cost, places, (count, width)
    assert best is not None
    _, places, (count, width) = best
    return np.array([row * width + offset for row, offset in places], np.int64), (count, width)


def dense_cost(lengths: np.ndarray, area_cost: float) -> float:
    """Cost of the rows that `place_dense` makes, in tokens through the decoder."""
    _, (count, width) = place_dense(lengths, area_cost)
    return count * width * (1 + area_cost * width)


def _deal(order: list[int], sizes: list[int], rows: int) -> tuple[list[tuple[int, int]], int]:
    """(row, offset) of every segment, and the tokens of the fullest row."""
    loads = [(0, row) for row in range(rows)]
    places = [(0, 0)] * len(sizes)
    for segment in order:
        load, row = heapq.heappop(loads)
        places[segment] = row, load
        heapq.heappush(loads, (load + sizes[segment], row))
    return places, max(load for load, _ in loads)


def row_length(tokens: int, shortest: int = BLOCK) -> int:
    """The length to pad one row of ``tokens`` to: few values, at most a quarter apart.

    Multiples of 128 that grow by about a quarter each, from ``shortest`` (rounded up) on. Flex
    attention compiles anew for every length it meets, and torch gives up after eight.
    """
    length = -(-max(shortest, 1) // BLOCK) * BLOCK
    while length < tokens:
        length += max(BLOCK, length // 4 // BLOCK * BLOCK)
    return length


def alternate(*parts: np.ndarray) -> np.ndarray:
    """The first of each part, then the second of each, ...: [number of parts · length]."""
    return np.stack(parts, axis=1).ravel()


def token_ids(
    shape: tuple[int, int],
    begins: np.ndarray,
    lengths: np.ndarray,
    segments: np.ndarray,
    offsets: np.ndarray,
    branches: np.ndarray,
) -> dict[str, np.ndarray]:
    """Position, segment and branch of every token of [B, T], from those of its part.

    Each part begins at the flat position ``begins``; its first token has position ``offsets``.
    Tokens of no part are padding: segment -1.
    """
    where = runs(begins, lengths)
    ids = {
        "position_ids": np.zeros(shape, np.int64),
        "segment_ids": np.full(shape, -1, np.int32),
        "branch_ids": np.zeros(shape, np.int32),
    }
    ids["position_ids"].reshape(-1)[where] = runs(offsets, lengths)
    ids["segment_ids"].reshape(-1)[where] = np.repeat(segments, lengths)
    ids["branch_ids"].reshape(-1)[where] = np.repeat(branches, lengths)
    return ids


def varlen_lengths(queries: np.ndarray, keys: np.ndarray) -> dict[str, Any]:
    """The arguments of varlen attention for S sequences of so many queries and keys each."""
    batch: dict[str, Any] = {}
    for name, lengths in (("q", queries), ("k", keys)):
        batch[f"cu_seq_lens_{name}"] = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=batch[f"cu_seq_lens_{name}"][1:])
        batch[f"max_length_{name}"] = int(lengths.max())
    return batch
