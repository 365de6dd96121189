"""Trees of pairs: a prompt with its answers, each once, and the pairs as edges between answers.

A row of the table is an *edge*: a prompt, a chosen answer and a rejected one. Pairs of one prompt
form a tree whose leaves are their distinct answers. A pair that shares its prompt with no other is
the tree with two leaves. Any group of a tree's pairs is a tree too, with the leaves that they name:
so a tree is split by dealing its pairs, and whatever holds pairs can be unfolded into sequences.

Legend: P pairs, S sequences (a prompt and one of its leaves), U trees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

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
