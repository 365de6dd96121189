"""Rows of a tokenized data set as batches read them, with the trees that they form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset

from ...errors import UserError
from ...settings.data import DataSettings
from ..formats.answers import DESIRABLE, NUMBER_COLUMNS, SCORES
from ..images.processor import IMAGE_KEY, IMAGES
from .columns import (
    FILLER_ID,
    PARTS,
    REFERENCE_COLUMNS,
    THEIR_REFERENCE_COLUMNS,
    TOKEN_COLUMNS,
    UNSCORED_COLUMNS,
)
from .mismatched import IDS, LEAF, UNSCORED
from .trees import PairLengths, Trees, name_trees


class PairRows(Dataset):
    """Rows of a tokenized data set with their ``pair_id``, as `PairBatches` indexes them.

    A row has its token columns and, where the data set has both (or was given them later), the
    reference's log-probs. Where pairs are grouped it also has ``tree_id`` and, of its chosen and
    its rejected answer, ``leaf_ids``; and ``weight`` and ``margin`` where there are any.

    Args:
        dataset: with the token columns.
        group_by_prompt: pairs whose prompts have equal tokens and images form one tree, and equal
            answers in it (scored alike, with the same log-probs of a reference) one leaf.
        margin_from, pair_weighting: as in the settings of data.
        max_length: of a prompt with the answer to another one.
        scored: rows also have ``score_chosen`` and ``score_rejected``, and answers with different
            scores are different leaves.

    Attributes:
        within: what rows are a part of, in messages that number them.
        longest_to_come: tokens that a sequence may have of which the length is not known yet.
    """

    within = ""
    longest_to_come = 0

    @classmethod
    def of(cls, dataset: Any, settings: DataSettings) -> PairRows:
        """The rows as the settings want them."""
        return cls(
            dataset,
            group_by_prompt=bool(settings.group_by_prompt),
            margin_from=settings.margin_from,
            pair_weighting=settings.pair_weighting,
            max_length=settings.max_length,
            scored=settings.takes == ("scored",),
        )

    def __init__(
        self,
        dataset: Any,
        *,
        group_by_prompt: bool = False,
        margin_from: str = "margin",
        pair_weighting: str = "pair",
        max_length: int | None = None,
        scored: bool = False,
    ) -> None:
        columns: list[str] = list(TOKEN_COLUMNS)
        if set(THEIR_REFERENCE_COLUMNS) <= set(dataset.column_names):
            names = zip(THEIR_REFERENCE_COLUMNS, REFERENCE_COLUMNS, strict=True)
            dataset = dataset.rename_columns(dict(names))
        if set(REFERENCE_COLUMNS) <= set(dataset.column_names):
            columns += REFERENCE_COLUMNS
        columns += [it for it in UNSCORED_COLUMNS if _is_used(dataset, it)]
        self.has_images = _is_used(dataset, IMAGE_KEY)  # that some prompts show
        columns += [IMAGES, IMAGE_KEY] if self.has_images else []
        said = {
            name: np.array(dataset[name][:], np.float64)
            for name in NUMBER_COLUMNS
            if name in dataset.column_names
        }
        for name, values in said.items():
            if np.isinf(values).any() or (name == "weight" and (values < 0).any()):
                raise UserError(
                    f"{name}: mend a row of the data set whose number is infinite, or a weight "
                    "below 0"
                )
        self.source, self.max_length = dataset, max_length
        self.dataset = dataset.select_columns(columns).with_format("arrow")
        self._reference: dict[str, np.ndarray] = {}
        by_prompt = pair_weighting == "prompt"
        of_answers = _scores(said, len(dataset)) if scored else {}
        self.single = DESIRABLE in said
        if self.single:
            of_answers = {DESIRABLE: _labels(said[DESIRABLE])}
        trees = name_trees(self._contents(of_answers)) if group_by_prompt or by_prompt else None
        alone = Trees.single(len(dataset)) if self.single else None
        self.trees = trees if group_by_prompt else alone
        self.numbers = pair_numbers(said, margin_from, trees if by_prompt else None) | of_answers

    @property
    def has_lists(self) -> bool:
        """Whether the answers to a prompt lie together, with their scores."""
        return self.trees is not None and SCORES[0] in self.numbers

    @cached_property
    def longest_exchanged(self) -> int:
        """Most tokens of any prompt with the answer to another one."""
        most = int(self.lengths.prompt.max(initial=0) + self.lengths.chosen.max(initial=0))
        return most if self.max_length is None else min(most, self.max_length)

    @cached_property
    def prompts(self) -> np.ndarray:
        """[pairs] a number for every prompt, equal for equal tokens and images."""
        return name_trees(self._contents({})).tree

    def _contents(self, numbers: dict[str, np.ndarray]) -> Iterator[tuple[bytes, bytes, bytes]]:
        """What makes prompts and answers of pairs equal: their tokens, and some numbers."""
        names, begin = [it for it in self.dataset.column_names if it != IMAGES], 0
        for table in self.dataset.select_columns(names).iter(batch_size=4096):
            columns: dict[str, Any] = {name: _values(table.column(name)) for name in names}
            columns |= {name: v[begin : begin + len(table)] for name, v in numbers.items()}
            begin += len(table)
            chosen, rejected = (
                [columns[name] for name in columns if side in name or name == DESIRABLE]
                for side in PARTS[1:]
            )
            prompt = [columns[it] for it in (TOKEN_COLUMNS[0], IMAGE_KEY) if it in columns]
            for i in range(len(table)):
                yield _content(prompt, i), _content(chosen, i), _content(rejected, i)

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
        prompt, chosen, rejected = (self.list_lengths(name) for name in TOKEN_COLUMNS)
        return PairLengths(prompt, chosen, rejected, self.trees)

    @cached_property
    def scored(self) -> PairLengths:
        """The same with the scored tokens of the answers alone, over which means are taken."""
        lengths = self.lengths
        left: dict[str, Any] = {
            name: self.list_lengths(name) if name in self.dataset.column_names else 0
            for name in UNSCORED_COLUMNS
        }
        chosen, rejected = (left[name] for name in UNSCORED_COLUMNS)
        return replace(
            lengths, chosen=lengths.chosen - chosen, rejected=lengths.rejected - rejected
        )

    def list_lengths(self, name: str) -> np.ndarray:
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

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """The rows of these indices; (index, neighbour) also gives one the neighbour's answer."""
        others = [index[1] for index in indices if isinstance(index, tuple)]
        indices = [index[0] if isinstance(index, tuple) else index for index in indices]
        row_numbers = [index if index >= 0 else FILLER_ID - index for index in indices]
        table: pa.Table = self.dataset[row_numbers]
        columns = {name: _values(table.column(name)) for name in table.column_names}
        numbers = self._reference | self.numbers
        columns |= {name: values[row_numbers] for name, values in numbers.items()}
        if self.trees is not None:
            trees = self.trees.take(np.array(row_numbers))
            columns |= {"tree_id": trees.tree, "leaf_ids": trees.leaves}
        if others:
            columns |= self._answers_of(others, self.lengths.prompt[row_numbers])
        return [
            {
                **{name: column[i] for name, column in columns.items()},
                "pair_id": index if index >= 0 else FILLER_ID,
            }
            for i, index in enumerate(indices)
        ]

    def _answers_of(self, rows: list[int], prompts: np.ndarray) -> dict[str, list[Any]]:
        """Their answers, cut to what prompts of so many tokens leave room for."""
        table: pa.Table = self.dataset[rows]
        rooms = np.maximum(self.longest_exchanged - prompts, 1)
        ids = _values(table.column(TOKEN_COLUMNS[1]))
        assert self.trees is not None  # single answers have them
        columns: dict[str, list[Any]] = {LEAF: self.trees.leaves[rows, 0].tolist()}
        columns[IDS] = [tokens[:room] for tokens, room in zip(ids, rooms, strict=True)]
        if UNSCORED_COLUMNS[0] in table.column_names:
            left = _values(table.column(UNSCORED_COLUMNS[0]))
            columns[UNSCORED] = [each[each < room] for each, room in zip(left, rooms, strict=True)]
        return columns

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]


def pair_numbers(
    said: dict[str, np.ndarray], margin_from: str, trees: Trees | None
) -> dict[str, np.ndarray]:
    """``weight`` and ``margin`` of every pair, those there are; a pair that says nothing has 1, 0.

    Args:
        said: columns of numbers, NaN where a row says nothing.
        margin_from: as in the settings of data.
        trees: where every prompt is to weigh alike, however many pairs it has.
    """
    numbers = {}
    if "weight" in said or trees is not None:
        numbers["weight"] = np.nan_to_num(said.get("weight", np.ones(1)), nan=1.0)
    if trees is not None:
        share = len(trees.tree) / len(trees) / np.bincount(trees.tree)
        numbers["weight"] = numbers["weight"] * share[trees.tree]
    if margin_from == "margin" and "margin" in said:
        numbers["margin"] = np.nan_to_num(said["margin"], nan=0.0)
    if margin_from == "scores" and set(SCORES) <= set(said):
        numbers["margin"] = np.nan_to_num(said[SCORES[0]] - said[SCORES[1]], nan=0.0)
    return numbers


def _labels(labels: np.ndarray) -> np.ndarray:
    if not np.isin(labels, (0.0, 1.0)).all():
        raise UserError(f"{DESIRABLE}: mend a row of the data set whose label is not 1 or 0")
    return labels


def _scores(said: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """The scores of every pair's answers, each of them given."""
    scores = {name: said.get(name, np.full(rows, np.nan)) for name in SCORES}
    lacking = int(np.isnan(sum(scores.values())).sum())
    if lacking:
        raise UserError(
            f"objective: give rows with {SCORES[0]} and {SCORES[1]}, or with several answers and "
            f"their scores or ranks, which a listwise one ranks; {lacking:,} of {rows:,} pairs "
            "have none. Or take an objective of pairs"
        )
    return scores


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


def _content(columns: list[Sequence[Any]], row: int) -> bytes:
    """A row's numbers in these columns, as bytes that only the same ones give."""
    values = [value for column in columns if (value := np.asarray(column[row])).size]
    return str([value.shape for value in values]).encode() + b"".join(v.tobytes() for v in values)
