"""Tokenized pairs -> one batch, and where its completions are predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..data.table import REFERENCE_COLUMNS, UNSCORED_COLUMNS
from ..settings.names import Layout
from .layout import (
    BLOCK,
    Rows,
    alternate,
    place_dense,
    row_length,
    runs,
    token_ids,
    varlen_lengths,
)

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "segment_ids",
    "branch_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "kv_index",
    "select",
    "targets",
)
PROMPT, CHOSEN, REJECTED = 0, 1, 2


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a patched model's forward, out of a collated batch."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


class PairCollator:
    """Collates P rows with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

    Rows may also have ``chosen_unscored`` and ``rejected_unscored``, positions in those completions
    that are read but not scored. Whatever the layout, with N scored completion tokens in all and
    [B, T] tokens in a batch:

    =====================  ==========  ==========================================================
    ``input_ids``          [B, T]      int64
    ``select``             [N]         int64, flat positions in [B·T] that predict a completion
                                       token: from the last prompt token to the last but one
    ``targets``            [N]         int64, the completion tokens themselves, P chosen
                                       completions and then P rejected
    ``cu_seqlens``         [2P + 1]    int32, where each completion begins in ``targets``
    ``pair_ids``           [P]         int64, the rows' ``pair_id`` (their place in the batch where
                                       they carry none); below 0 marks a filler pair
    ``decoder_tokens``     [3]         int64: tokens computed, of those not padding, tokens that
                                       the padded layout would compute
    ``reference_logps``    [2P]        fp32, where the rows carry ``reference_chosen_logps`` and
                                       ``reference_rejected_logps``: a frozen model's summed
                                       log-probs
    =====================  ==========  ==========================================================

    ``layout`` says what a row holds. "padded" stacks P chosen and P rejected sequences, B = 2P,
    padded on the right to the longest, with ``attention_mask`` [2P, T] int64. The others lay
    *segments* one after another in a row: "packed" a sequence each (prompt and completion),
    "prefix_shared" a pair each (prompt, chosen, rejected; rejected restarts its positions after the
    prompt and must not see chosen):

    =====================  ==========  ==========================================================
    ``position_ids``       [B, T]      int64, in the token's own sequence
    ``segment_ids``        [B, T]      int32, the sequence or pair a token is of; -1 on padding
    ``branch_ids``         [B, T]      int32: 0 prompt or packed sequence, 1 chosen, 2 rejected
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
                                       sequence sees, prompt and chosen or prompt and rejected
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
    ):
        self.pad_token_id = pad_token_id
        self.layout: Layout = layout
        self.rows: Rows = rows
        self.area_cost = area_cost
        self.shortest_row = shortest_row

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        prompts = [row["prompt_ids"] for row in rows]
        sides = [[row[f"{side}_ids"] for row in rows] for side in ("chosen", "rejected")]
        lengths = np.array([[len(part) for part in p] for p in (prompts, *sides)], np.int64)
        completions = [completion for side in sides for completion in side]
        if self.layout == "padded":
            batch = self._padded(prompts, completions, lengths)
        elif self.layout == "packed":
            batch = self._packed(prompts, completions, lengths)
        else:
            batch = self._prefix_shared(prompts, sides, lengths)
        cu_seqlens = np.zeros(2 * len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths[1:].ravel(), out=cu_seqlens[1:])
        batch["targets"] = np.concatenate([np.asarray(c, np.int64) for c in completions])
        batch["cu_seqlens"] = cu_seqlens
        if any(name in rows[0] for name in UNSCORED_COLUMNS):
            _leave_unscored_out(batch, rows)
        batch["pair_ids"] = np.array(
            [row.get("pair_id", i) for i, row in enumerate(rows)], np.int64
        )
        padded = 2 * len(rows) * int((lengths[0] + lengths[1:]).max())
        real = lengths.sum() + (0 if self.layout == "prefix_shared" else lengths[0].sum())
        batch["decoder_tokens"] = np.array([batch["input_ids"].size, real, padded], np.int64)
        if all(name in rows[0] for name in REFERENCE_COLUMNS):
            logps = [row[name] for name in REFERENCE_COLUMNS for row in rows]
            batch["reference_logps"] = np.array(logps, np.float32)
        return {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in batch.items()
        }

    def _padded(self, prompts: list, completions: list, lengths: np.ndarray) -> dict[str, Any]:
        starts, counts = np.tile(lengths[0], 2), lengths[1:].ravel()
        width = int((starts + counts).max())
        begins = np.arange(len(starts)) * width
        pieces = [*prompts, *prompts, *completions]
        flat = self._filled(len(starts) * width, pieces, np.concatenate([begins, begins + starts]))
        mask = np.arange(width) < (starts + counts)[:, None]
        return {
            "input_ids": flat.reshape(-1, width),
            "attention_mask": mask.astype(np.int64),
            "select": runs(begins + starts - 1, counts),
        }

    def _packed(self, prompts: list, completions: list, lengths: np.ndarray) -> dict[str, Any]:
        starts, counts = np.tile(lengths[0], 2), lengths[1:].ravel()
        totals = starts + counts
        begins, shape = self._place(totals)
        pieces = [*prompts, *prompts, *completions]
        flat = self._filled(shape[0] * shape[1], pieces, np.concatenate([begins, begins + starts]))
        sequences, zeros = np.arange(len(totals)), np.zeros_like(totals)
        batch = {
            "input_ids": flat.reshape(shape),
            **token_ids(shape, begins, totals, sequences, zeros, zeros),
            "select": runs(begins + starts - 1, counts),
        }
        if self.rows == "varlen":
            batch |= varlen_lengths(totals, totals)
        return batch

    def _prefix_shared(
        self, prompts: list, sides: list[list], lengths: np.ndarray
    ) -> dict[str, Any]:
        starts, chosen, rejected = lengths
        begins, shape = self._place(lengths.sum(0))
        ends = begins + starts
        # Parts in the order prompts, chosen, rejected; P of each.
        part_begins = np.concatenate([begins, ends, ends + chosen])
        pieces = [*prompts, *sides[0], *sides[1]]
        flat = self._filled(shape[0] * shape[1], pieces, part_begins)
        pairs = np.arange(len(starts))
        select = runs(np.concatenate([ends - 1, ends + chosen - 1]), lengths[1:].ravel())
        # What follows rejected's first token is predicted inside rejected, the first by the prompt.
        first = int(chosen.sum()) + np.cumsum(rejected) - rejected
        select[first[rejected > 0]] = (ends - 1)[rejected > 0]
        batch = {
            "input_ids": flat.reshape(shape),
            **token_ids(
                shape,
                part_begins,
                lengths.ravel(),
                np.tile(pairs, 3),
                np.concatenate([np.zeros_like(starts), starts, starts]),
                np.repeat([PROMPT, CHOSEN, REJECTED], len(pairs)),
            ),
            "select": select,
        }
        if self.rows == "varlen":
            first_branch = starts + chosen
            queries = alternate(first_branch, rejected)
            keys = alternate(first_branch, starts + rejected)
            batch |= varlen_lengths(queries, keys)
            spans = [(begins, first_branch), (begins, starts), (ends + chosen, rejected)]
            batch["kv_index"] = runs(*(alternate(*part) for part in zip(*spans, strict=True)))
        return batch

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


def _leave_unscored_out(batch: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Take what is not scored out of ``select`` and ``targets``: it stays in the input alone."""
    begins = batch["cu_seqlens"]
    unscored = [row.get(name, ()) for name in UNSCORED_COLUMNS for row in rows]
    keep = np.ones(len(batch["targets"]), dtype=bool)
    for begin, positions in zip(begins[:-1], unscored, strict=True):
        keep[begin + np.asarray(positions, np.int64)] = False
    batch["select"], batch["targets"] = batch["select"][keep], batch["targets"][keep]
    batch["cu_seqlens"] = np.concatenate([[0], np.cumsum(keep)]).astype(np.int32)[begins]
