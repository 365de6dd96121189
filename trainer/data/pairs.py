"""Settings, or a raw data set -> tokenized pairs in their final order, and the report of rows.

Rows are tokenized once: `cached_map` keeps the result on disk under a hash of everything the tokens
depend on. The hash covers the raw rows (the data set's own fingerprint), the tokenizer's content
and template, the rendering and the limits; never the identity of an object, nor the truncation and
padding that a tokenizer remembers from its last call. So the next run finds the result, and so do
the other processes of this one: they wait for the first on a lock file, not in a collective that
times out. A file that is damaged or cut off is tokenized again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from ..errors import UserError
from ..settings.data import DataSettings
from .chat import Rendering, only_id, template_notes
from .encoding import PairTokenizer, TokenizedReader
from .formats.cached_files import DyingWithParent, unchanged
from .formats.damage import naming_bad_text
from .formats.files import ONE_TABLE
from .limits import OK, TEXT_LOST, Limits
from .report import DataReport, SourceCount, SplitReport, count_rows
from .sources import Part, checked_columns, gather
from .table import (
    TOKEN_COLUMNS,
    UNSCORED_COLUMNS,
    check_reference,
    features,
    is_tokenized,
    other_side,
    reference_of,
    with_reference,
)
from .template import generation_stops, with_template
from .turns import end_of_turn_id

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Raise it when the same rows, tokenizer and settings come to give other tokens or counts.
_VERSION = 4


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
    settings.check()
    tokenizer = with_template(tokenizer, settings)
    rows, notes = checked_columns(name, dataset, settings.columns)
    part = Part(name, ONE_TABLE, rows, len(rows), notes)
    return assemble(
        [part], tokenizer, settings, training=training, shuffle=False, vocab_size=vocab_size
    )


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
    tables, sources, origins = [], [], []
    for part, low, high in zip(parts, starts[:-1], starts[1:], strict=True):
        rows = used[(used >= low) & (used < high)] - low
        sources.append(SourceCount(part.name, part.split, part.available, len(rows), part.notes))
        origins += [(part, int(row)) for row in rows]
        if len(rows):
            raw = part.rows if len(rows) == len(part.rows) else part.rows.select(rows)
            with naming_bad_text(part.name, part.rows):
                tokens = cached_map(raw, tokenizer, settings)
            tables.append(with_reference(part.name, tokens, raw))
    check_reference(tables, _names(parts))
    table = concatenate_datasets(tables)
    arrow: pyarrow.Table = table.with_format("arrow")[:]
    trains = np.array([status == OK for status in arrow["status"].to_pylist()], dtype=bool)
    report = count_rows("train" if training else "evaluation", sources, origins, arrow, trains)
    _check_rows(report, settings)
    _check_vocabulary(int(arrow["max_id"].to_numpy().max()), vocab_size)
    positions = np.searchsorted(used, order)
    some = any(pc.list_value_length(arrow[name]).to_numpy().any() for name in UNSCORED_COLUMNS)  # pyright: ignore
    kept = [*TOKEN_COLUMNS, *(UNSCORED_COLUMNS if some else ()), *reference_of(table)]
    table = table.select_columns(kept)
    return _arrange(table, positions[trains[positions]], settings, training, report), report


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
        swapped = table.rename_columns({c: other_side(c) for c in table.column_names[1:]})
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
        raise UserError(
            f"{report.split} data from {_names(report.sources)}: none of {report.rows} rows can "
            f"train ({counts}){first}; mend the rows, or raise the length limits"
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


def cached_map(raw: Dataset, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> Dataset:
    """The rows of ``raw`` tokenized (or, if they hold ids already, checked and cut)."""
    from datasets import config
    from filelock import FileLock

    limits, rendering = Limits.of(settings), Rendering.of(settings)
    if is_tokenized(raw) and rendering.score != "completion":
        raise UserError(
            f"score: {rendering.score} needs the conversations, and the data set holds token ids; "
            f"give it the columns {', '.join(UNSCORED_COLUMNS)}, or set score: completion"
        )
    stops = generation_stops(tokenizer, settings)
    key = fingerprint(raw, tokenizer, limits, rendering, stops)
    folder = os.path.join(config.HF_DATASETS_CACHE, "widemargin")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"pairs-{key}.arrow")
    with FileLock(path + ".lock"), unchanged(Path(folder), key):
        return raw.map(
            DyingWithParent(
                TokenizedReader(limits, only_id(tokenizer.bos_token_id))
                if is_tokenized(raw)
                else PairTokenizer(tokenizer, limits, rendering, stops)
            ),
            batched=True,
            remove_columns=raw.column_names,
            features=features(),
            num_proc=settings.preprocessing_num_workers,
            new_fingerprint=key,
            cache_file_name=path,
            desc="Tokenizing pairs",
        )


def fingerprint(
    raw: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    rendering: Rendering | None = None,
    stops: frozenset[int] = frozenset(),
) -> str:
    """The hash of all that decides the tokens of ``raw``."""
    import tokenizers
    import transformers
    from datasets.fingerprint import Hasher

    versions = [_VERSION, transformers.__version__, tokenizers.__version__]
    settings = [asdict(limits), asdict(rendering or Rendering()), sorted(stops)]
    facts = [versions, raw._fingerprint, _tokenizer_content(tokenizer), settings]
    return Hasher.hash(json.dumps(facts, sort_keys=True, default=str))


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    content: Any
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"vocabulary": tokenizer.get_vocab(), "init": tokenizer.init_kwargs}
    else:
        backend.no_truncation()  # left from its last call; the next call sets it again
        backend.no_padding()
        content = backend.to_str()
    return {
        "class": type(tokenizer).__name__,
        "content": content,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "split_special": getattr(tokenizer, "split_special_tokens", None),
    }
