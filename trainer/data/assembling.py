"""Parts -> one tokenized data set in its final order, and the counts of what became of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError
from ..settings.data import DataSettings
from ..text import printable
from .caching import cached_map
from .columns import TOKEN_COLUMNS
from .limits import FLAGS, MISMATCH, OK
from .mixing import Part
from .report import EXAMPLES_SHOWN, LengthStats, SourceCount, SplitReport

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def assemble(
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    training: bool,
    shuffle: bool,
    vocab_size: int | None,
) -> tuple[Dataset, SplitReport]:
    """The pairs of ``parts`` that can train, and the report of all their rows."""
    from datasets import concatenate_datasets

    starts = np.cumsum([0, *(len(part.rows) for part in parts)])
    order = np.arange(starts[-1])
    if shuffle:  # the permutation that Dataset.shuffle(seed) makes
        order = np.random.default_rng(settings.mix_seed).permutation(len(order))
    order = order[: settings.max_train_samples if training else settings.max_eval_samples]
    if not len(order):
        raise UserError(f"{_names(parts)}: no rows; check the fractions and the files")
    used = np.sort(order)
    tables, sources, row_names = [], [], []
    for part, low, high in zip(parts, starts[:-1], starts[1:], strict=True):
        rows = used[(used >= low) & (used < high)] - low
        sources.append(SourceCount(part.name, part.split, part.available, len(rows)))
        row_names += [(part, int(row)) for row in rows]
        if len(rows):
            raw = part.rows if len(rows) == len(part.rows) else part.rows.select(rows)
            tables.append(cached_map(raw, tokenizer, settings))
    table = concatenate_datasets(tables)
    arrow: pyarrow.Table = table.with_format("arrow")[:]
    trains = np.array([status == OK for status in arrow["status"].to_pylist()], dtype=bool)
    report = _report("train" if training else "evaluation", sources, row_names, arrow, trains)
    _check_rows(report, settings)
    _check_vocabulary(int(arrow["max_id"].to_numpy().max()), vocab_size)
    positions = np.searchsorted(used, order)
    table = table.select_columns(list(TOKEN_COLUMNS))
    return _arrange(table, positions[trains[positions]], settings, training, report), report


def _arrange(
    table: Dataset,
    positions: np.ndarray,
    settings: DataSettings,
    training: bool,
    report: SplitReport,
) -> Dataset:
    """The rows at ``positions``, in that order, numbered, and some of them with sides swapped."""
    from datasets import concatenate_datasets

    if training and settings.flip:
        swaps = np.random.default_rng([settings.mix_seed, 1]).random(len(positions)) < settings.flip
        swapped = table.rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
        # Both orders one after the other, without copying: a swapped pair is a row of the second.
        positions = positions + len(table) * swaps
        table = concatenate_datasets([table, swapped.select_columns(table.column_names)])
        report.flipped = int(swaps.sum())
    pair_ids = np.full(len(table), -1)
    pair_ids[positions] = np.arange(len(positions))
    return table.add_column("pair_id", pair_ids).select(positions)


def _report(
    split: str,
    sources: list[SourceCount],
    row_names: list[tuple[Part, int]],
    arrow: pyarrow.Table,
    trains: np.ndarray,
) -> SplitReport:
    skipped = Counter(status for status in arrow["status"].to_pylist() if status != OK)
    mismatches = trains & (arrow["flags"].to_numpy() >> FLAGS.index(MISMATCH) & 1 > 0)

    def first(rows: np.ndarray, why: Callable[[int], str]) -> list[str]:
        shown = [int(i) for i in np.flatnonzero(rows)[:EXAMPLES_SHOWN]]
        return [f"{row_names[i][0].row_name(row_names[i][1])}: {why(i)}" for i in shown]

    return SplitReport(
        split,
        sources,
        rows=len(trains),
        pairs=int(trains.sum()),
        skipped=dict(skipped.most_common()),
        examples=first(~trains, lambda i: _why(arrow, i)),
        flags=_flag_counts(arrow, trains),
        mismatches=first(mismatches, lambda i: arrow["detail"][i].as_py()),
        lengths=_lengths(arrow, trains),
    )


def _why(arrow: pyarrow.Table, position: int) -> str:
    reason, detail = (arrow[column][position].as_py() for column in ("status", "detail"))
    return printable(f"{reason} ({detail})" if detail else reason, 300)


def _flag_counts(arrow: pyarrow.Table, trains: np.ndarray) -> dict[str, int]:
    flags = arrow["flags"].to_numpy()[trains]
    counts = {name: int((flags >> i & 1).sum()) for i, name in enumerate(FLAGS)}
    return {name: count for name, count in counts.items() if count}


def _lengths(arrow: pyarrow.Table, trains: np.ndarray) -> dict[str, LengthStats]:
    stats = {}
    for column in TOKEN_COLUMNS:
        chunks = [np.diff(chunk.offsets.to_numpy()) for chunk in arrow[column].chunks]
        stats[column.removesuffix("_ids")] = _length_stats(np.concatenate(chunks)[trains])
    return stats


def _length_stats(lengths: np.ndarray) -> LengthStats:
    if not len(lengths):
        return LengthStats(0.0, 0.0, 0.0, 0, 0)
    mean, (median, p95) = round(float(lengths.mean()), 1), np.percentile(lengths, [50, 95])
    return LengthStats(mean, float(median), float(p95), int(lengths.max()), int(lengths.sum()))


def _names(sources: Sequence[Part] | Sequence[SourceCount]) -> str:
    return ", ".join(dict.fromkeys(source.name for source in sources))


def _check_rows(report: SplitReport, settings: DataSettings) -> None:
    counts = ", ".join(f"{count} {reason}" for reason, count in report.skipped.items())
    if not report.pairs:
        first = f"; {report.examples[0]}" if report.examples else ""
        raise UserError(
            f"{report.split} data from {_names(report.sources)}: none of {report.rows} rows can "
            f"train ({counts}){first}; mend the rows, or raise the length limits"
        )
    if settings.strict_data and report.skipped:
        raise UserError(
            f"strict_data: {report.examples[0]}; of {report.rows} rows, {counts}; "
            "mend the rows, or unset strict_data to skip them"
        )


def _check_vocabulary(largest: int, vocab_size: int | None) -> None:
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"tokenizer ids exceed the model's vocabulary: the data has token id {largest}, the "
            f"model {vocab_size} embedding rows; use the model's own tokenizer, or resize its "
            "embeddings"
        )
