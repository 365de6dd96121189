"""Columns of the table of tokens and of the reference: names, how pairs become rows, digests."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ...errors import UserError
from ...files import digest
from ..formats.answers import DESIRABLE, NUMBER_COLUMNS, SCORES
from ..formats.shapes import SINGLE, shape_of
from ..images.processor import IMAGE_KEY, IMAGES, image_key
from ..limits import FLAGS, OK, Tokens
from ..rows import RowProblem

PARTS = ("prompt", "chosen", "rejected")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
UNSCORED_COLUMNS = ("chosen_unscored", "rejected_unscored")
"""Positions in the answers that are read but not scored; a data set without them scores all."""
_NO_NUMBERS = (math.nan,) * len(NUMBER_COLUMNS)
_OUTCOME_COLUMNS = ("status", "detail", "flags", "max_id", *NUMBER_COLUMNS)
REFERENCE_COLUMNS = ("reference_chosen_logps", "reference_rejected_logps")
THEIR_REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")  # in TRL

FILLER_ID = -1
"""The ``pair_id`` of a pair that only fills a batch; smaller ones name the row it repeats."""


def is_tokenized(dataset: Any) -> bool:
    """Whether a data set holds token ids already, by its columns."""
    return set(TOKEN_COLUMNS) <= set(getattr(dataset, "column_names", None) or ())


def is_single(dataset: Any) -> bool:
    """Whether the rows of checked columns are single answers with labels."""
    if is_tokenized(dataset):
        return DESIRABLE in dataset.column_names
    shape = shape_of(tuple(dataset.column_names))
    return shape is not None and shape.needs == SINGLE


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
    """``table`` with the reference's log-probs, where the columns of ``raw`` have them, by row."""
    rows = np.array(table["row"][:])
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
        table = table.add_column(ours, logps[rows])
    return table


def check_reference(tables: list[Any], names: str) -> None:
    if len({bool(reference_of(table)) for table in tables}) > 1:
        raise UserError(
            f"{names}: some have reference_chosen_logps and reference_rejected_logps and "
            "some not; leave the columns out, or have them in all"
        )


def check_scores(margin_from: str, pairs: Any, said: Collection[str], name: str) -> None:
    """Raise ``UserError`` where margins are to come from scores, and pairs have none.

    Args:
        margin_from: as in the settings of data.
        pairs: their columns by name, or a data set with them.
        said: columns that say something.
        name: what messages call the data sets.
    """
    if margin_from != "scores":
        return
    if not set(SCORES) <= set(said):
        raise UserError(
            f"margin_from: the rows of {name} have no columns {' and '.join(SCORES)}; "
            "give them, rows with several answers and scores, or leave margin_from out"
        )
    lacking = np.isnan(sum(np.array(pairs[each][:], np.float64) for each in SCORES))
    if lacking.any():
        raise UserError(
            f"margin_from: {lacking.sum():,} of {lacking.size:,} pairs of {name} lack {SCORES[0]} "
            f"or {SCORES[1]}; give every pair both, or leave margin_from out"
        )


def check_kind(takes: tuple[str, ...] | None, single: bool, name: str) -> None:
    """Raise ``UserError`` where an objective that ``takes`` some kinds gets another.

    Args:
        takes: see `ObjectiveSpec`; None for any.
        single: whether the rows of the data set ``name`` are single answers with labels.
    """
    if takes is None or ("labelled" in takes if single else takes != ("labelled",)):
        return
    if single:
        raise UserError(
            f"objective: take kto or apo-zero-unpaired, as {name} has single answers with labels; "
            "or give it pairs: prompt, chosen and rejected"
        )
    raise UserError(
        f"objective: take one of pairs, such as apo-zero or kto with kl_estimate: batch, as {name} "
        "has pairs; or give it single answers: prompt, completion and label"
    )


def features(images: bool = False) -> Any:
    """The ``datasets.Features`` of what `token_columns` makes."""
    from datasets import Features, List, Value

    types = dict.fromkeys((*TOKEN_COLUMNS, *UNSCORED_COLUMNS), List(Value("int32")))
    numbers = {"flags": Value("int32"), "max_id": Value("int64"), "row": Value("int64")}
    numbers |= dict.fromkeys(NUMBER_COLUMNS, Value("float64"))
    texts = {"status": Value("string"), "detail": Value("string")}
    of_images = {IMAGES: List(Value("binary")), IMAGE_KEY: List(Value("int64"))}
    return Features({**types, **texts, **numbers, **(of_images if images else {})})


def token_columns(
    outcomes: Iterable[Tokens | RowProblem], images: bool = False
) -> dict[str, list[Any]]:
    """A batch of tokenized pairs by column: those of `features` but ``row``.

    Lists are empty where a pair cannot train, and numbers NaN where its row says nothing.
    """
    names = (*TOKEN_COLUMNS, *UNSCORED_COLUMNS, *_OUTCOME_COLUMNS)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    shown: list[list[bytes]] = []
    for outcome in outcomes:
        shown.append([] if isinstance(outcome, RowProblem) else outcome.images)
        if isinstance(outcome, RowProblem):
            values = ([], [], [], [], [], outcome.reason, outcome.detail, 0, -1, *_NO_NUMBERS)
        else:
            sides = (outcome.prompt, outcome.chosen, outcome.rejected)
            flags = sum(1 << i for i, flag in enumerate(FLAGS) if flag in outcome.flags)
            numbers = [outcome.numbers.get(name, math.nan) for name in NUMBER_COLUMNS]
            largest = max(map(max, sides))
            values = (*sides, *outcome.unscored, OK, outcome.detail, flags, largest, *numbers)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    if images:
        columns |= {IMAGES: shown, IMAGE_KEY: [image_key(each) for each in shown]}
    return columns


def tokens_digest(rows: Any) -> str:
    """The hash of every pair's token ids in `PairRows`, and of its images, in order."""
    some = [it for it in (*UNSCORED_COLUMNS, IMAGE_KEY) if it in rows.dataset.column_names]
    names = [*TOKEN_COLUMNS, *some]

    def chunks() -> Iterator[bytes]:
        for table in rows.dataset.select_columns(names).with_format("arrow").iter(batch_size=4096):
            for name in names:
                column = table.column(name)
                for numbers in (pc.list_value_length(column), pc.list_flatten(column)):  # pyright: ignore
                    yield numbers.to_numpy().astype(np.int64).tobytes()

    return digest(chunks())


def numbers_digest(rows: Any) -> str:
    """The hash of every pair's weight and margin; "" where there are none."""
    numbers = sorted(rows.numbers.items())
    return digest(name.encode() + v.tobytes() for name, v in numbers) if numbers else ""


def columns_digest(rows: Any) -> str:
    """The hash of the log-probs that the data set itself has."""
    table: Any = rows.dataset.with_format("numpy")[:]
    return digest(np.asarray(table[name], np.float64).tobytes() for name in REFERENCE_COLUMNS)
