"""The trees of a batch's rows, unfolded: what the layouts place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..data.table import TOKEN_COLUMNS
from ..data.table.trees import Trees


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
