"""A tokenized data set by rows, as the planner and the loader read it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from ..errors import UserError
from .columns import FILLER_ID, REFERENCE_COLUMNS, THEIR_REFERENCE_COLUMNS, TOKEN_COLUMNS
from .lengths import PairLengths


class PairRows(Dataset):
    """Rows of a tokenized data set with their ``pair_id``, as `PairBatches` indexes them.

    A row has its token columns and, where the data set has both (or was given them later), the
    reference's log-probs.
    """

    def __init__(self, dataset: Any) -> None:
        columns: list[str] = list(TOKEN_COLUMNS)
        if set(THEIR_REFERENCE_COLUMNS) <= set(dataset.column_names):
            names = zip(THEIR_REFERENCE_COLUMNS, REFERENCE_COLUMNS, strict=True)
            dataset = dataset.rename_columns(dict(names))
        if set(REFERENCE_COLUMNS) <= set(dataset.column_names):
            columns += REFERENCE_COLUMNS
        self.dataset = dataset.select_columns(columns).with_format("arrow")
        self._reference: dict[str, np.ndarray] = {}

    @property
    def has_reference(self) -> bool:
        """Whether rows carry the reference's log-probs."""
        return bool(self._reference) or REFERENCE_COLUMNS[0] in self.dataset.column_names

    def set_reference(self, logps: dict[str, np.ndarray]) -> None:
        """Give every row the reference's log-probs: columns named as in `REFERENCE_COLUMNS`."""
        self._reference = logps

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def lengths(self) -> PairLengths:
        """Tokens of every pair's parts, from Arrow's offsets: no token is read."""
        # The table's rows stand as they were stored; select and shuffle keep a list beside it.
        stored = self.dataset._indices
        rows = slice(None) if stored is None else stored.column(0).to_numpy()

        def lengths(name: str) -> np.ndarray:
            return _list_lengths(self.dataset.data.column(name)).astype(np.int64)[rows]

        return PairLengths(*(lengths(name) for name in TOKEN_COLUMNS))

    def check(self, name: str, vocab_size: int) -> None:
        """Raise ``UserError`` for tokens that cannot train; ``name`` is what messages call them."""
        parts = ("prompt", "chosen", "rejected")
        whole = self.dataset._indices is None
        table: Any = self.dataset.data if whole else self.dataset[:]
        for column, part in zip(TOKEN_COLUMNS, parts, strict=True):
            empty = np.flatnonzero(getattr(self.lengths, part) == 0)
            if len(empty):
                raise UserError(
                    f"{name}: {column} of row {empty[0]} is empty, {len(empty)} in all; every "
                    "pair needs a prompt (BOS at least) and two answers: leave such rows out"
                )
            ids = pc.call_function("list_flatten", [table.column(column)])
            limits = pc.call_function("min_max", [ids])
            least, most = (limits[key].as_py() for key in ("min", "max"))
            if least is not None and not 0 <= least <= most < vocab_size:
                raise UserError(
                    f"{name}: {column} has token ids from {least} to {most}, the model's "
                    f"vocabulary those from 0 to {vocab_size - 1}; use the model's own tokenizer"
                )

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        wanted = [index if index >= 0 else FILLER_ID - index for index in indices]
        table: pa.Table = self.dataset[wanted]
        columns = {name: _values(table.column(name)) for name in table.column_names}
        columns |= {name: logps[wanted] for name, logps in self._reference.items()}
        return [
            {
                **{name: column[i] for name, column in columns.items()},
                "pair_id": index if index >= 0 else FILLER_ID,
            }
            for i, index in enumerate(indices)
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]


def _values(column: pa.ChunkedArray) -> Sequence[Any]:
    """A column's values by row: arrays of tokens, or numbers."""
    if not pa.types.is_nested(column.type):
        return column.to_numpy()
    tokens = pc.call_function("list_flatten", [column]).to_numpy()
    ends = np.cumsum(_list_lengths(column))
    return np.split(tokens, ends[:-1])


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.call_function("list_value_length", [column]).to_numpy()
