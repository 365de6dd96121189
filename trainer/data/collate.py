"""Tokenized pairs -> one padded batch, and where its completions are predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


MODEL_INPUTS = ("input_ids", "attention_mask", "select", "targets")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a collated batch a patched model's forward takes."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


class PairCollator:
    """Collates P rows with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

    Sequences are laid out P chosen, then P rejected, each its prompt and completion padded on the
    right to T, the longest (``padded_to_multiple_of`` rounds T up). N completion tokens in all:

    ==================  ============  ===========================================================
    ``input_ids``       [2P, T]       int64
    ``attention_mask``  [2P, T]       int64, 1 on tokens
    ``select``          [N]           int64, flat positions in [2P·T] that predict a completion
                                      token: from the last prompt token to the last but one
    ``targets``         [N]           int64, the completion tokens themselves
    ``cu_seqlens``      [2P + 1]      int32, where each sequence begins in ``targets``
    ``pair_ids``        [P]           int64, the rows' ``pair_id`` (their place in the batch where
                                      they carry none); below 0 marks a filler pair
    ==================  ============  ===========================================================
    """

    def __init__(self, pad_token_id: int, padded_to_multiple_of: int | None = None):
        self.pad_token_id = pad_token_id
        self.padded_to_multiple_of = padded_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        prompts = [np.asarray(row["prompt_ids"], dtype=np.int64) for row in rows] * 2
        completions = [
            np.asarray(row[side], dtype=np.int64)
            for side in ("chosen_ids", "rejected_ids")
            for row in rows
        ]
        starts = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        counts = np.array([len(completion) for completion in completions], dtype=np.int64)
        width = self._width(int((starts + counts).max()))
        input_ids = np.full((len(prompts), width), self.pad_token_id, dtype=np.int64)
        for line, prompt, completion in zip(input_ids, prompts, completions, strict=True):
            line[: len(prompt)] = prompt
            line[len(prompt) : len(prompt) + len(completion)] = completion
        cu_seqlens = np.zeros(len(prompts) + 1, dtype=np.int32)
        np.cumsum(counts, out=cu_seqlens[1:])
        # Position of each sequence's first prediction, less its place among all predictions.
        shifts = np.arange(len(prompts)) * width + starts - 1 - cu_seqlens[:-1]
        batch = {
            "input_ids": input_ids,
            "attention_mask": (np.arange(width) < (starts + counts)[:, None]).astype(np.int64),
            "select": np.arange(cu_seqlens[-1]) + np.repeat(shifts, counts),
            "targets": np.concatenate(completions),
            "cu_seqlens": cu_seqlens,
            "pair_ids": np.array([row.get("pair_id", i) for i, row in enumerate(rows)], np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _width(self, longest: int) -> int:
        multiple = self.padded_to_multiple_of or 1
        return -(-longest // multiple) * multiple
