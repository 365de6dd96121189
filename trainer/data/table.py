"""The table of tokens: its columns, how pairs become rows of it, and how batches read it.

Every name of a column stands here, of raw rows and of tokenized ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from ..errors import UserError
from .limits import FLAGS, OK, Tokens
from .rows import RowProblem

PARTS = ("prompt", "chosen", "rejected")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
UNSCORED_COLUMNS = ("chosen_unscored", "rejected_unscored")
"""Positions in the answers that are read but not scored; a data set without them scores all."""
_OUTCOME_COLUMNS = ("status", "detail", "flags", "max_id")
REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")
THEIR_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # in TRL

FILLER_ID = -1
"""The ``pair_id`` of a pair that only fills a batch; smaller ones name the row it repeats."""


def is_tokenized(dataset: Any) -> bool:
    """Whether a data set holds token ids already, by its columns."""
    return set(TOKEN_COLUMNS) <= set(getattr(dataset, "column_names", None) or ())


def reference_columns(columns: list[str]) -> list[str]:
    for names in (REFERENCE_COLUMNS, THEIR_REFERENCE_COLUMNS):
        if set(names) <= set(columns):
            return list(names)
    return []


def other_side(column: str) -> str:
    sides = {"chosen": "rejected", "rejected": "chosen"}
    return re.sub("chosen|rejected", lambda side: sides[side[0]], column)


def reference_of(table: Any) -> list[str]:
    return [name for name in REFERENCE_COLUMNS if name in table.column_names]


def with_reference(name: str, table: Any, raw: Any) -> Any:
    """``table`` with the reference's log-probs, where the columns of ``raw`` have them."""
    for ours, theirs in zip(REFERENCE_COLUMNS, reference_columns(raw.column_names), strict=False):
        try:
            logps = np.array(raw[theirs][:], dtype=np.float64)
        except (TypeError, ValueError):
            logps = np.array([np.nan])
        if not np.isfinite(logps).all():
            raise UserError(
                f"{name}: {theirs} holds something that is no finite number; mend the column, or "
                "leave it out to have the reference's log-probs computed"
            )
        table = table.add_column(ours, logps)
    return table


def check_reference(tables: list[Any], names: str) -> None:
    if len({bool(reference_of(table)) for table in tables}) > 1:
        raise UserError(
            f"{names}: some have reference_chosen_logps and reference_rejected_logps and "
            "some not; leave the columns out, or have them in all"
        )


def features() -> Any:
    """The ``datasets.Features`` of what `token_columns` makes."""
    from datasets import Features, List, Value

    types = dict.fromkeys((*TOKEN_COLUMNS, *UNSCORED_COLUMNS), List(Value("int32")))
    numbers = {"flags": Value("int32"), "max_id": Value("int64")}
    return Features({**types, "status": Value("string"), "detail": Value("string"), **numbers})


def token_columns(outcomes: Iterable[Tokens | RowProblem]) -> dict[str, list[Any]]:
    """A batch of tokenized rows by column: those of `features`, empty where a row cannot train."""
    names = (*TOKEN_COLUMNS, *UNSCORED_COLUMNS, *_OUTCOME_COLUMNS)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for outcome in outcomes:
        if isinstance(outcome, RowProblem):
            values = ([], [], [], [], [], outcome.reason, outcome.detail, 0, -1)
        else:
            sides = (outcome.prompt, outcome.chosen, outcome.rejected)
            flags = sum(1 << i for i, flag in enumerate(FLAGS) if flag in outcome.flags)
            values = (*sides, *outcome.unscored, OK, outcome.detail, flags, max(map(max, sides)))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


@dataclass(frozen=True)
class PairLengths:
    """Tokens of every pair's parts, [pairs] int64 each."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    @cached_property
    def shared(self) -> np.ndarray:
        """[pairs] prompt, chosen and rejected tokens."""
        return self.prompt + self.chosen + self.rejected

    def alone(self, layout: str) -> np.ndarray:
        """[pairs] tokens the decoder computes for each pair when it is by itself.

        Args:
            layout: "padded", "packed" (two sequences) or "prefix_shared" (one prompt for both).
        """
        if layout == "padded":
            return 2 * (self.prompt + np.maximum(self.chosen, self.rejected))
        return self.shared + self.prompt if layout == "packed" else self.shared


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
        columns += [name for name in UNSCORED_COLUMNS if _is_used(dataset, name)]
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
        return PairLengths(*(self._list_lengths(name) for name in TOKEN_COLUMNS))

    @cached_property
    def scored(self) -> PairLengths:
        """The same with the scored tokens of the answers alone, over which means are taken."""
        lengths = self.lengths
        left: dict[str, Any] = {
            name: self._list_lengths(name) if name in self.dataset.column_names else 0
            for name in UNSCORED_COLUMNS
        }
        chosen, rejected = (left[name] for name in UNSCORED_COLUMNS)
        return PairLengths(lengths.prompt, lengths.chosen - chosen, lengths.rejected - rejected)

    def _list_lengths(self, name: str) -> np.ndarray:
        # The table's rows stand as they were stored; select and shuffle keep a list beside it.
        stored = self.dataset._indices
        rows = slice(None) if stored is None else stored.column(0).to_numpy()
        return _list_lengths(self.dataset.data.column(name)).astype(np.int64)[rows]

    def check(self, name: str, vocab_size: int) -> None:
        """Raise ``UserError`` for tokens that cannot train; ``name`` is what messages call them."""
        in_stored_order = self.dataset._indices is None
        table: Any = self.dataset.data if in_stored_order else self.dataset[:]
        for column, part in zip(TOKEN_COLUMNS, PARTS, strict=True):
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
        row_numbers = [index if index >= 0 else FILLER_ID - index for index in indices]
        table: pa.Table = self.dataset[row_numbers]
        columns = {name: _values(table.column(name)) for name in table.column_names}
        columns |= {name: logps[row_numbers] for name, logps in self._reference.items()}
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


def _is_used(dataset: Any, name: str) -> bool:
    """Whether a column of lists is there and not empty in every row."""
    return name in dataset.column_names and bool(_list_lengths(dataset.data.column(name)).any())
