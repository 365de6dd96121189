"""Settings, or a raw data set -> tokenized pairs in their final order, and the report of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from ..errors import UserError
from ..settings.data import DataSettings
from .cached import cached_map
from .chat import template_notes
from .formats.answers import NUMBER_COLUMNS
from .formats.damage import naming_bad_text
from .formats.files import ONE_TABLE
from .images.processor import IMAGE_KEY, IMAGES, processor_of
from .limits import IDENTICAL_CUT, NOT_SCORED, NOTHING_LEFT, OK, TEXT_LOST
from .report import DataReport, SourceCount, SplitReport, count_rows
from .sources import Part, checked_columns, first_row_notes, gather, has_answers
from .table import (
    TOKEN_COLUMNS,
    UNSCORED_COLUMNS,
    check_kind,
    check_reference,
    check_scores,
    is_single,
    other_side,
    reference_of,
    with_reference,
)
from .table.trees import runs
from .template import generation_stops, with_template
from .turns import end_of_turn_id

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass
class PairData:
    """Pairs with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``; `PairRows` numbers them.

    A split that the settings do not name is None.
    """

    train: Dataset | None
    evaluation: Dataset | None
    report: DataReport


def load_pairs(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> PairData:
    """Load, mix, tokenize and check the data sets that ``settings`` names.

    ``vocab_size`` is the model's (rows of its embedding); a token id past it is an error. A
    ``chat_template`` in the settings becomes the tokenizer's, so that it is saved with the model.
    """
    settings.check()
    report = DataReport()
    parts = gather(settings, report.notes)
    if not any(parts):
        raise UserError(
            "no data: set dataset: (or dataset_mixer:) to a file, a folder or a hub name, "
            "and dataset_splits: to the splits to use"
        )
    _settle_grouping(settings, [*parts[0], *parts[1]])
    tokenizer = with_template(tokenizer, settings)
    if tokenizer.chat_template:
        end_id = end_of_turn_id(tokenizer, generation_stops(tokenizer, settings))
        report.notes += template_notes(tokenizer, settings, end_id)

    def build(parts: list[Part], training: bool) -> tuple[Dataset | None, SplitReport | None]:
        if not parts:
            return None, None
        return assemble(
            parts,
            tokenizer,
            settings,
            training=training,
            shuffle=settings.shuffle,
            vocab_size=vocab_size,
        )

    train, report.train = build(parts[0], True)
    evaluation, report.evaluation = build(parts[1], False)
    return PairData(train, evaluation, report)


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings | None = None,
    *,
    training: bool = True,
    vocab_size: int | None = None,
    name: str = "train_dataset",
) -> tuple[Dataset, SplitReport]:
    """The pairs of a raw (or tokenized) data set, in its own order, and their report.

    ``training`` says which of the settings apply: ``flip`` and ``max_train_samples``, or
    ``max_eval_samples``. ``name`` is what messages call the data set.
    """
    settings = settings or DataSettings()
    return tokenize_parts(
        [dataset], tokenizer, settings, training=training, vocab_size=vocab_size, name=name
    )


def tokenize_parts(
    datasets: Sequence[Dataset],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    training: bool = True,
    vocab_size: int | None = None,
    name: str = "train_dataset",
    folder: str | None = None,
) -> tuple[Dataset, SplitReport]:
    """As `tokenize_pairs`, of several data sets one after another.

    ``folder`` keeps their tokens, in place of the cache.
    """
    settings.check()
    tokenizer = with_template(tokenizer, settings)
    several = settings.edges is not None
    parts = []
    for dataset in datasets:
        rows, notes = checked_columns(name, dataset, settings.columns, several=several)
        parts.append(Part(name, ONE_TABLE, rows, len(rows), notes))
    _settle_grouping(settings, parts)
    return assemble(
        parts,
        tokenizer,
        settings,
        training=training,
        shuffle=False,
        vocab_size=vocab_size,
        folder=folder,
    )


def assemble(
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    training: bool,
    shuffle: bool,
    vocab_size: int | None,
    folder: str | None = None,
) -> tuple[Dataset, SplitReport]:
    """The pairs of ``parts`` that can train, and the report of all their rows.

    ``folder`` keeps their tokens, in place of the cache.
    """
    from datasets import concatenate_datasets

    _check_kinds(parts, settings)
    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    order = np.arange(starts[-1])
    if shuffle:  # the permutation that Dataset.shuffle(seed) makes
        order = np.random.default_rng(settings.mix_seed).permutation(len(order))
    order = order[: settings.max_train_samples if training else settings.max_eval_samples]
    if not len(order):
        raise UserError(f"{_names(parts)}: no rows; check the fractions and the files")
    used = np.sort(order)
    images = processor_of([part.rows for part in parts], tokenizer, settings)
    tables, sources, origins, places = [], [], [], []
    for part, low, high in zip(parts, starts[:-1], starts[1:], strict=True):
        rows = used[(used >= low) & (used < high)] - low
        if training:
            with naming_bad_text(part.name, part.rows):
                part.notes += first_row_notes(part.rows, tokenizer.chat_template)
        sources.append(SourceCount(part.name, part.split, part.available, len(rows), part.notes))
        if len(rows):
            raw = part.rows if len(rows) == len(part.rows) else part.rows.select(rows)
            with naming_bad_text(part.name, part.rows):
                tokens = cached_map(raw, tokenizer, settings, images, folder)
            tables.append(with_reference(part.name, tokens, raw))
            made = np.array(tokens["row"][:])
            origins += [(part, int(rows[row])) for row in made]
            places.append(made + np.searchsorted(used, low))
    check_reference(tables, _names(parts))
    table = concatenate_datasets(tables)
    shown = [] if images is None else [IMAGES, IMAGE_KEY]
    arrow: pyarrow.Table = table.remove_columns(shown).with_format("arrow")[:]
    trains = np.array([status == OK for status in arrow["status"].to_pylist()], dtype=bool)
    report = count_rows("train" if training else "evaluation", sources, origins, arrow, trains)
    _check_rows(report, settings)
    _check_vocabulary(int(arrow["max_id"].to_numpy().max()), vocab_size)
    positions = _of_rows(np.concatenate(places), np.searchsorted(used, order))
    some = any(pc.list_value_length(arrow[name]).to_numpy().any() for name in UNSCORED_COLUMNS)  # pyright: ignore
    numbers = {name: arrow[name].to_numpy()[trains] for name in NUMBER_COLUMNS}
    said = [name for name, values in numbers.items() if not np.isnan(values).all()]
    if training:
        check_scores(settings.margin_from, numbers, said, _names(parts))
    kept = [*TOKEN_COLUMNS, *(UNSCORED_COLUMNS if some else ()), *reference_of(table), *said]
    table = table.select_columns([*kept, *shown])
    return _arrange(table, positions[trains[positions]], settings, training, report), report


def _check_kinds(parts: Sequence[Part], settings: DataSettings) -> None:
    """Raise ``UserError`` for rows of a kind that the objective cannot train on, or of two."""
    for part in parts:
        check_kind(settings.takes, is_single(part.rows), part.name)
    single = {is_single(part.rows) for part in parts}
    if len(single) > 1:
        raise UserError(
            f"{_names(parts)}: some have pairs and some single answers with labels; train on one "
            "kind"
        )
    if settings.flip and single == {True}:
        raise UserError("flip: set it to 0; it swaps the sides of pairs, and the rows have labels")


def _settle_grouping(settings: DataSettings, parts: Sequence[Part]) -> None:
    """Give ``group_by_prompt`` its value where it is None; say where ``edges`` has no effect."""
    if settings.edges is not None and settings.takes != ("scored",):
        for part in parts:
            if not has_answers(part.rows):
                part.notes.append("edges has no effect: no row has several answers")
    if settings.group_by_prompt is None:
        several = [part for part in parts if has_answers(part.rows)]
        settings.settle("group_by_prompt", bool(several))
        for part in several:
            part.notes.append("pairs of one prompt run together (group_by_prompt: true)")


def _of_rows(places: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where the pairs of these rows stand: ``places`` has each pair's row, in order."""
    begins, ends = (np.searchsorted(places, rows, side=side) for side in ("left", "right"))
    return runs(begins, ends - begins)


def _arrange(
    table: Dataset,
    positions: np.ndarray,
    settings: DataSettings,
    training: bool,
    report: SplitReport,
) -> Dataset:
    """The rows at ``positions``, in that order, and some of them with sides swapped."""
    from datasets import concatenate_datasets

    if training and settings.flip:
        swaps = np.random.default_rng([settings.mix_seed, 1]).random(len(positions)) < settings.flip
        sides = {c: other_side(c) for c in table.column_names if c != other_side(c)}
        swapped = table.rename_columns(sides)
        # Both orders one after the other, without copying: a swapped pair is a row of the second.
        positions = positions + len(table) * swaps
        table = concatenate_datasets([table, swapped.select_columns(table.column_names)])
        report.flipped = int(swaps.sum())
    return table.select(positions)


def _names(sources: Sequence[Part] | Sequence[SourceCount]) -> str:
    return ", ".join(dict.fromkeys(source.name for source in sources))


def _check_rows(report: SplitReport, settings: DataSettings) -> None:
    counts = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items())
    if not report.pairs:
        first = f"; {report.examples[0]}" if report.examples else ""
        cut = {NOTHING_LEFT, IDENTICAL_CUT, NOT_SCORED} & report.skipped.keys()
        limits = ", or raise the length limits" if cut else ""
        raise UserError(
            f"{report.split} data from {_names(report.sources)}: none of {report.rows} rows can "
            f"train ({counts}){first}; mend the rows{limits}"
        )
    lost = report.flags.get(TEXT_LOST, 0)
    if settings.strict_data and (report.skipped or lost):
        counts = ", ".join(filter(None, [counts, f"{lost} {TEXT_LOST}" if lost else ""]))
        first = (report.examples or report.losses)[0]
        raise UserError(
            f"strict_data: {first}; of {report.rows} rows, {counts}; "
            "mend the rows, or unset strict_data to skip them"
        )


def _check_vocabulary(largest: int, vocab_size: int | None) -> None:
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"tokenizer ids exceed the model's vocabulary: the data has token id {largest}, the "
            f"model {vocab_size} embedding rows; use the model's own tokenizer, or resize its "
            "embeddings"
        )
