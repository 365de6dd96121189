"""Tokenized pairs -> one batch of their trees, and where its completions are predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.formats.answers import DESIRABLE, SCORES
from ..data.images.processor import IMAGES
from ..data.table import REFERENCE_COLUMNS, UNSCORED_COLUMNS
from ..data.table.mismatched import IDS, exchanged, with_exchanged
from ..data.table.trees import runs
from ..parallel.groups import Place
from ..settings.names import Layout
from .images import add_images
from .inputs import FROZEN, MISMATCHED, MODEL_INPUTS
from .layout import (
    BLOCK,
    Forest,
    Rows,
    alternate,
    check_arguments,
    place_dense,
    row_length,
    token_ids,
    varlen_lengths,
)

if TYPE_CHECKING:
    from ..data.images.processor import ImageProcessor


class PairCollator:
    """Collates P rows with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

    Rows of one ``tree_id`` share their prompt, and answers of one number in ``leaf_ids`` are one
    leaf: the batch has U prompts and S sequences, each a prompt and one leaf, and P *edges* between
    them. A row without those numbers is a tree with two leaves, so that S is 2P. Rows may also have
    ``chosen_unscored`` and ``rejected_unscored``, positions in those completions that are read but
    not scored. Whatever the layout, with N scored completion tokens in all and [B, T] tokens in a
    batch:

    =====================  ==========  ==========================================================
    ``input_ids``          [B, T]      int64
    ``select``             [N]         int64, flat positions in [B·T] that predict a completion
                                       token: from the last prompt token to the last but one
    ``targets``            [N]         int64, the completion tokens themselves: the first leaf of
                                       every tree, then the second of every one, and so on
    ``cu_seqlens``         [S + 1]     int32, where each completion begins in ``targets``
    ``edges``              [P, 2]      int64, the sequences of each pair's chosen and rejected
                                       answer: i and P + i where no pair shares its prompt
    ``pair_ids``           [P]         int64, the rows' ``pair_id`` (their place in the batch where
                                       they carry none); below 0 marks a filler pair
    ``weights``,           [P]         fp32, where the rows carry ``weight``, ``margin``: what
    ``margins``                        multiplies a pair's loss, and what its target margin gains
    ``tree_ids``,          [S]         int64 and fp32, where the rows carry ``score_chosen`` and
    ``scores``                         ``score_rejected``: the tree of each, and the leaf's score
    ``labels``             [S]         bool, and ``tree_ids``, where the rows carry ``desirable``
    ``mismatched_...``                 inputs of the model and ``cu_seqlens`` of every prompt with
                                       the neighbours' answers, each once, where the rows carry
                                       them; ``pairs`` [P] int64, the sequence there of each pair
    ``frozen_...``                     the same of every prompt with its own answers too, and
                                       ``sequences`` [S] int64, where the S sequences are there
    ``decoder_tokens``     [3]         int64: tokens computed, of those not padding, tokens that
                                       the padded layout would compute of the pairs
    ``num_tokens``         [1]         int64, tokens of the pairs' sequences, fillers left out:
                                       prompts count once for each answer
    ``reference_logps``    [S]         fp32, where the rows carry ``reference_chosen_logps`` and
                                       ``reference_rejected_logps``: a frozen model's summed
                                       log-probs
    =====================  ==========  ==========================================================

    Where rows have images, ``images`` is their processor, and `add_images` says what is added.

    With ``scores_prompts`` the prompts, each once, follow the completions in ``select`` and
    ``targets``, but for each one's first token, which nothing predicts:

    ======================  =========  ==========================================================
    ``prompt_cu_seqlens``   [U + 2]    int64: 0, then where each prompt begins in ``targets``
    ``prompts``             [P]        int64, the prompt of each pair
    ======================  =========  ==========================================================

    ``layout`` says what a row holds. "padded" stacks the sequences, B = S, padded on the right to
    the longest, with ``attention_mask`` [S, T] int64. The others lay *segments* one after another
    in a row: "packed" a sequence each (prompt and completion), "prefix_shared" a tree each (prompt
    and leaves; every leaf starts its positions after the prompt and must not see the others):

    =====================  ==========  ==========================================================
    ``position_ids``       [B, T]      int64, in the token's own sequence
    ``segment_ids``        [B, T]      int32, the sequence or tree a token is of; -1 on padding
    ``branch_ids``         [B, T]      int32: 0 prompt or packed sequence, then leaves from 1 on
    =====================  ==========  ==========================================================

    ``rows`` says how many rows, by what attention costs: "dense" (a mask of T² entries, all of
    them computed) as many as cost least, where one entry costs ``area_cost`` tokens; "blocks"
    (flex attention) one, padded to one of few lengths from ``shortest_row`` on, since another
    length compiles anew; "varlen" one without padding, and for its attention

    ======================  =========  ==========================================================
    ``cu_seq_lens_q``,      [S + 1]    int32, where each sequence's queries, and its keys, begin
    ``cu_seq_lens_k``
    ``max_length_q``, ``k``            the longest of each, numbers on the host
    ``kv_index``            [K]        int64, "prefix_shared" only: the tokens whose keys each
                                       sequence sees: its prompt's and its leaf's
    ``own_targets``         [..]       int64, with a ``place`` only: the ``targets`` of this rank
    ======================  =========  ==========================================================
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        layout: Layout = "padded",
        rows: Rows = "dense",
        area_cost: float = 1e-3,
        shortest_row: int = BLOCK,
        place: Place | None = None,
    ):
        check_arguments(pad_token_id, layout, rows)
        self.pad_token_id = pad_token_id
        self.layout: Layout = layout
        self.rows: Rows = rows
        self.area_cost = area_cost
        self.shortest_row = shortest_row
        self.place = place
        self.scores_prompts = False
        self.images: ImageProcessor | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        forest = Forest.of(rows)
        layouts = {
            "padded": self._padded,
            "packed": self._packed,
            "prefix_shared": self._prefix_shared,
        }
        batch = layouts[self.layout](forest)
        if IMAGES in rows[0]:
            add_images(self.images, batch, forest, rows, self.layout == "prefix_shared")
        batch["targets"] = np.concatenate([np.asarray(c, np.int64) for c in forest.completions])
        batch["cu_seqlens"] = np.concatenate([[0], np.cumsum(forest.counts)]).astype(np.int32)
        if any(name in rows[0] for name in UNSCORED_COLUMNS):
            _leave_unscored_out(batch, forest.of_leaves(rows, UNSCORED_COLUMNS, ()))
        prompt_begins = batch.pop("prompt_begins")
        if self.scores_prompts:
            _score_prompts(batch, forest, prompt_begins)
        if self.place is not None:
            batch["own_targets"] = self.place.own_targets(batch["select"])
        batch["edges"] = forest.edges
        batch["pair_ids"] = np.array(
            [row.get("pair_id", i) for i, row in enumerate(rows)], np.int64
        )
        shared = self.layout == "prefix_shared"
        real = forest.counts.sum() + (forest.starts if shared else forest.prompts_again).sum()
        sides = len(rows) + int((forest.edges[:, 0] != forest.edges[:, 1]).sum())
        padded = sides * int(forest.totals.max())
        batch["decoder_tokens"] = np.array([batch["input_ids"].size, real, padded], np.int64)
        counted = forest.edges[batch["pair_ids"] >= 0]
        batch["num_tokens"] = np.array([forest.totals[counted].sum()], np.int64)
        for name in ("weight", "margin"):
            if name in rows[0]:
                batch[f"{name}s"] = np.array([row[name] for row in rows], np.float32)
        if all(name in rows[0] for name in SCORES):
            batch["tree_ids"] = forest.tree
            batch["scores"] = np.array(forest.of_leaves(rows, SCORES), np.float32)
        if DESIRABLE in rows[0]:
            batch["tree_ids"] = forest.tree
            batch["labels"] = np.array(forest.of_leaves(rows, (DESIRABLE, DESIRABLE))) > 0
        if IDS in rows[0]:
            self._add_mismatched(batch, forest, rows)
        if all(name in rows[0] for name in REFERENCE_COLUMNS):
            logps = forest.of_leaves(rows, REFERENCE_COLUMNS)
            batch["reference_logps"] = np.array(logps, np.float32)
        return {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in batch.items()
        }

    def _add_mismatched(
        self, batch: dict[str, Any], forest: Forest, rows: Sequence[Mapping[str, Any]]
    ) -> None:
        for prefix, part in ((MISMATCHED, exchanged(rows)), (FROZEN, with_exchanged(rows))):
            made = self(part)
            names = (name for name in (*MODEL_INPUTS, "cu_seqlens") if name in made)
            batch |= {prefix + name: made[name] for name in names}
            edges = made["edges"].numpy()
            batch[prefix + "pairs"] = edges[-len(rows) :, 0]
        sequences = np.empty(len(forest.counts), np.int64)
        sequences[forest.edges] = edges[: len(rows)]  # of the last, which has the own answers first
        batch[FROZEN + "sequences"] = sequences

    def _padded(self, forest: Forest) -> dict[str, Any]:
        width = int(forest.totals.max())
        begins = np.arange(len(forest.totals)) * width
        flat = self._sequences(len(begins) * width, begins, forest)
        mask = np.arange(width) < forest.totals[:, None]
        return {
            "input_ids": flat.reshape(-1, width),
            "attention_mask": mask.astype(np.int64),
            "select": runs(begins + forest.prompts_again - 1, forest.counts),
            "prompt_begins": begins[forest.branch == 1],
        }

    def _packed(self, forest: Forest) -> dict[str, Any]:
        totals = forest.totals
        begins, shape = self._place(totals)
        flat = self._sequences(shape[0] * shape[1], begins, forest)
        sequences, zeros = np.arange(len(totals)), np.zeros_like(totals)
        batch = {
            "input_ids": flat.reshape(shape),
            **token_ids(shape, begins, totals, sequences, zeros, zeros),
            "select": runs(begins + forest.prompts_again - 1, forest.counts),
            "prompt_begins": begins[forest.branch == 1],
        }
        if self.rows == "varlen":
            batch |= varlen_lengths(totals, totals)
        return batch

    def _prefix_shared(self, forest: Forest) -> dict[str, Any]:
        starts, counts, tree = forest.starts, forest.counts, forest.tree
        leaves = np.bincount(tree, weights=counts).astype(np.int64)
        begins, shape = self._place(starts + leaves)
        ends = begins + starts
        # A leaf begins where the one before it in its tree ends; the first, where the prompt does.
        order = forest.by_tree
        before = np.cumsum(counts[order]) - counts[order]
        leaf_begins = np.empty_like(counts)
        leaf_begins[order] = before + (ends - (np.cumsum(leaves) - leaves))[tree[order]]
        part_begins = np.concatenate([begins, leaf_begins])
        pieces = [*forest.prompts, *forest.completions]
        flat = self._filled(shape[0] * shape[1], pieces, part_begins)
        select = runs(leaf_begins - 1, counts)
        # What follows a leaf's first token is predicted inside the leaf, the first by the prompt.
        first = np.cumsum(counts) - counts
        select[first[counts > 0]] = (ends[tree] - 1)[counts > 0]
        batch = {
            "input_ids": flat.reshape(shape),
            **token_ids(
                shape,
                part_begins,
                np.concatenate([starts, counts]),
                np.concatenate([np.arange(len(starts)), tree]),
                np.concatenate([np.zeros_like(starts), starts[tree]]),
                np.concatenate([np.zeros_like(starts), forest.branch]),
            ),
            "select": select,
            "prompt_begins": begins,
        }
        if self.rows == "varlen":
            prompt, leaf = starts[tree[order]], counts[order]
            batch |= varlen_lengths(leaf + prompt * (forest.branch[order] == 1), leaf + prompt)
            spans = [(begins[tree[order]], prompt), (leaf_begins[order], leaf)]
            batch["kv_index"] = runs(*(alternate(*part) for part in zip(*spans, strict=True)))
        return batch

    def _sequences(self, size: int, begins: np.ndarray, forest: Forest) -> np.ndarray:
        """Flat padding with every sequence where it begins."""
        pieces = [*(forest.prompts[tree] for tree in forest.tree), *forest.completions]
        return self._filled(size, pieces, np.concatenate([begins, begins + forest.prompts_again]))

    def _place(self, totals: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Flat beginning of every segment, and the shape [B, T] of the rows."""
        if self.rows == "dense":
            return place_dense(totals, self.area_cost)
        length = int(totals.sum())
        if self.rows == "blocks":
            length = row_length(length, self.shortest_row)
        return np.cumsum(totals) - totals, (1, length)

    def _filled(self, size: int, pieces: Sequence[Any], begins: np.ndarray) -> np.ndarray:
        """Flat padding with every piece of tokens where it begins."""
        flat = np.full(size, self.pad_token_id, dtype=np.int64)
        for piece, begin in zip(pieces, begins.tolist(), strict=True):
            flat[begin : begin + len(piece)] = piece
        return flat


def _leave_unscored_out(batch: dict[str, Any], unscored: Sequence[Any]) -> None:
    """Take what is not scored out of ``select`` and ``targets``: it stays in the input alone."""
    begins = batch["cu_seqlens"]
    keep = np.ones(len(batch["targets"]), dtype=bool)
    for begin, positions in zip(begins[:-1], unscored, strict=True):
        keep[begin + np.asarray(positions, np.int64)] = False
    batch["select"], batch["targets"] = batch["select"][keep], batch["targets"][keep]
    batch["cu_seqlens"] = np.concatenate([[0], np.cumsum(keep)]).astype(np.int32)[begins]


def _score_prompts(batch: dict[str, Any], forest: Forest, begins: np.ndarray) -> None:
    """Append what predicts the prompts, which lie at ``begins`` [U], to what predicts answers."""
    counts = np.maximum(forest.starts - 1, 0)
    ends = len(batch["targets"]) + np.cumsum(counts)
    batch["prompt_cu_seqlens"] = np.concatenate([[0, len(batch["targets"])], ends])
    batch["prompts"] = forest.tree[forest.edges[:, 0]]
    batch["select"] = np.concatenate([batch["select"], runs(begins, counts)])
    tokens = [np.asarray(prompt[1:], np.int64) for prompt in forest.prompts]
    batch["targets"] = np.concatenate([batch["targets"], *tokens])
