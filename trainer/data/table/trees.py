"""Trees of pairs: a prompt with its answers, each once, and the pairs as edges between answers.

A row of the table is an *edge*: a prompt, a chosen answer and a rejected one. Pairs of one prompt
form a tree whose leaves are their distinct answers. A pair that shares its prompt with no other is
the tree with two leaves. Any group of a tree's pairs is a tree too, with the leaves that they name:
so a tree is split by dealing its pairs, and whatever holds pairs can be unfolded into sequences.
`PairLengths` tells what groups of pairs cost in a batch, whatever they share.

Legend: P pairs, S sequences (a prompt and one of its leaves), U trees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Trees:
    """The tree and the leaves of every pair, by number."""

    tree: np.ndarray  # [P] int64, numbered by first appearance
    leaves: np.ndarray  # [P, 2] int64, of chosen and rejected; no two trees share a number

    @classmethod
    def apart(cls, pairs: int) -> Trees:
        """Every pair a tree of its own."""
        return cls(np.arange(pairs), np.arange(2 * pairs).reshape(-1, 2))

    @classmethod
    def single(cls, answers: int) -> Trees:
        """Of answers without a counterpart, each a tree by itself: an edge from it to itself."""
        every = np.arange(answers)
        return cls(every, np.stack([every, every], axis=1))

    def __len__(self) -> int:
        return int(self.tree.max(initial=-1)) + 1

    def take(self, pairs: np.ndarray) -> Trees:
        """Those of some pairs, under the same numbers."""
        return Trees(self.tree[pairs], self.leaves[pairs])

    def sequences(self) -> Sequences:
        """Every leaf once; see `Sequences`."""
        _, first, leaf = np.unique(self.leaves, return_index=True, return_inverse=True)
        _, seen, tree = np.unique(self.tree, return_index=True, return_inverse=True)
        by_appearance = np.argsort(np.argsort(seen, kind="stable"), kind="stable")
        tree = by_appearance[tree.ravel()]
        owner = tree[first // 2]
        inside = np.lexsort((first, owner))  # tree by tree, its leaves by their first appearance
        counts = np.bincount(owner, minlength=len(seen))
        branch = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.lexsort((owner[inside], branch))
        place = np.empty(len(first), np.int64)
        place[inside[order]] = np.arange(len(first))
        return Sequences(
            first=first[inside[order]],
            tree=owner[inside[order]],
            branch=branch[order] + 1,
            edges=place[leaf.reshape(self.leaves.shape)],
        )


@dataclass(frozen=True)
class Sequences:
    """The leaves of some pairs, each once: the first of every tree, then the second of every one.

    Trees and their leaves keep the order in which pairs name them. So where no pairs share a
    prompt the sequences are all chosen answers and then all rejected ones.
    """

    first: np.ndarray  # [S] the first place that has the leaf, in [P, 2] counted through
    tree: np.ndarray  # [S] numbered by first appearance, from 0
    branch: np.ndarray  # [S] from 1, which leaf of its tree
    edges: np.ndarray  # [P, 2] the sequences of every pair's chosen and rejected answer

    @property
    def by_tree(self) -> np.ndarray:
        """[S] the sequences tree by tree, as they lie in a row."""
        return np.lexsort((self.branch, self.tree))


def name_trees(rows: Iterable[tuple[bytes, bytes, bytes]]) -> Trees:
    """The trees of pairs by content: a prompt, a chosen and a rejected answer as bytes each."""
    prompts: dict[bytes, int] = {}
    answers: dict[bytes, int] = {}
    tree, leaves = [], []
    for prompt, *sides in rows:
        number = prompts.setdefault(_digest(prompt), len(prompts))
        tree.append(number)
        prefix = number.to_bytes(8, "little")
        leaves.append([answers.setdefault(_digest(prefix + s), len(answers)) for s in sides])
    return Trees(np.array(tree, np.int64), np.array(leaves, np.int64).reshape(-1, 2))


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


@dataclass(frozen=True)
class PairLengths:
    """Tokens of every pair's parts, [pairs] int64 each, and the trees that pairs form."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    trees: Trees | None = None  # None: every pair is a tree of its own

    def __len__(self) -> int:
        return len(self.prompt)

    @cached_property
    def tree(self) -> np.ndarray:
        """[pairs] the tree of every pair."""
        return np.arange(len(self)) if self.trees is None else self.trees.tree

    @cached_property
    def single(self) -> bool:
        """Whether the rows are single answers, which stand on both sides; see `Trees.single`."""
        leaves = None if self.trees is None else self.trees.leaves
        return leaves is not None and len(leaves) > 0 and bool((leaves[:, 0] == leaves[:, 1]).all())

    @property
    def noun(self) -> str:
        """What a row is."""
        return "answer" if self.single else "pair"

    @cached_property
    def apart(self) -> PairLengths:
        """The same pairs with nothing shared between them."""
        return replace(self, trees=Trees.single(len(self)) if self.single else None)

    @cached_property
    def shared(self) -> np.ndarray:
        """[pairs] prompt, chosen and rejected tokens."""
        return self.prompt + self.chosen + self.rejected

    def alone(self, layout: str) -> np.ndarray:
        """[pairs] tokens the decoder computes for each pair when it is by itself.

        Args:
            layout: "padded", "packed" (two sequences) or "prefix_shared" (one prompt for both).
        """
        every = np.arange(len(self))
        return self.computed(layout, every, every, len(self))

    def take(self, pairs: np.ndarray) -> PairLengths:
        """Those of some pairs."""
        trees = None if self.trees is None else self.trees.take(pairs)
        return PairLengths(self.prompt[pairs], self.chosen[pairs], self.rejected[pairs], trees)

    def unfold(self, pairs: np.ndarray, groups: np.ndarray) -> SequenceLengths:
        """The sequences of pairs that are computed in groups: of each group every leaf once.

        Args:
            pairs: [M] which.
            groups: [M] int64 from 0, where each is computed.
        """
        some = self.take(pairs)
        trees = some.trees or Trees.apart(len(some))
        size = int(trees.leaves.max(initial=-1)) + 1
        inside = Trees(
            groups * (int(trees.tree.max(initial=-1)) + 1) + trees.tree,
            groups[:, None] * size + trees.leaves,
        ).sequences()
        pair = inside.first // 2
        completions = np.stack([some.chosen, some.rejected], axis=1).ravel()[inside.first]
        return SequenceLengths(
            some.prompt[pair], completions, groups[pair], inside.tree, inside.by_tree
        )

    def computed(
        self, layout: str, pairs: np.ndarray, groups: np.ndarray, count: int
    ) -> np.ndarray:
        """[count] tokens the decoder computes for each group of pairs; see `unfold`."""
        sequences = self.unfold(pairs, groups)
        if layout == "prefix_shared":
            return sequences.per_group(sequences.branch_tokens, count)
        if layout == "packed":
            return sequences.per_group(sequences.totals, count)
        longest = np.zeros(count, np.int64)
        np.maximum.at(longest, sequences.group, sequences.totals)
        return longest * sequences.rows(count)


@dataclass(frozen=True)
class TreeLengths:
    """The trees of pairs in the pairs' place: what is counted, dealt and never cut is a tree."""

    pairs: PairLengths

    noun = "prompt"

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def tree(self) -> np.ndarray:
        """[U] itself."""
        return np.arange(len(self))

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.bincount(self.pairs.tree)

    @cached_property
    def _members(self) -> np.ndarray:
        return np.argsort(self.pairs.tree, kind="stable")

    def pairs_of(self, trees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of some trees, tree after tree, and how many each has."""
        sizes, begins = self._sizes[trees], np.cumsum(self._sizes) - self._sizes
        return self._members[runs(begins[trees], sizes)], sizes

    def alone(self, layout: str) -> np.ndarray:
        """[U] tokens the decoder computes for each tree by itself; see `PairLengths.computed`."""
        return self.computed(layout, self.tree, self.tree, len(self))

    def computed(
        self, layout: str, trees: np.ndarray, groups: np.ndarray, count: int
    ) -> np.ndarray:
        """[count] tokens the decoder computes for each group of trees."""
        pairs, sizes = self.pairs_of(trees)
        return self.pairs.computed(layout, pairs, np.repeat(groups, sizes), count)


@dataclass(frozen=True)
class SequenceLengths:
    """Tokens of sequences, [S] each, in the order of `Sequences`."""

    prompt: np.ndarray
    completion: np.ndarray
    group: np.ndarray
    tree: np.ndarray  # from 0; a tree in two groups counts as two
    by_tree: np.ndarray  # the order in which they lie in a row

    @cached_property
    def totals(self) -> np.ndarray:
        """[S] prompt and completion."""
        return self.prompt + self.completion

    @cached_property
    def leads(self) -> np.ndarray:
        """[S] bool: the first of its tree, which computes the prompt where it is shared."""
        leads = np.zeros(len(self.tree), bool)
        leads[np.unique(self.tree, return_index=True)[1]] = True
        return leads

    @cached_property
    def branch_tokens(self) -> np.ndarray:
        """[S] tokens that each adds where prompts are shared."""
        return self.completion + self.prompt * self.leads

    @cached_property
    def tree_tokens(self) -> np.ndarray:
        """[U] tokens of every tree: its prompt and its leaves."""
        return np.bincount(self.tree, weights=self.branch_tokens).astype(np.int64)

    def rows(self, count: int) -> np.ndarray:
        """[count] sequences of each group."""
        return np.bincount(self.group, minlength=count)

    def per_group(self, values: np.ndarray, count: int) -> np.ndarray:
        """[count] sums of whole numbers [S] over the sequences of each group."""
        return np.bincount(self.group, weights=values, minlength=count).astype(np.int64)


def runs(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``begin, begin + 1, ...`` of each length, one run after another: [sum of lengths] int64."""
    shifts = begins - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum())) + np.repeat(shifts, lengths)
