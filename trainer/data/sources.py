"""Names of data sets -> the raw rows that a run trains and evaluates on.

`gather` divides the settings' data sets into parts: the first rows of one split of one source.
`open_source` of `formats.files` reads one name as a ``datasets.Dataset`` for each split. A name is
a file, a folder or a hub name, with ``:subset`` after it where there are several. A folder is, in
this order: something ``save_to_disk`` wrote; folders it wrote, named as splits; files named as
splits, in any case (``train.jsonl``, ``pairs_test.parquet``, ``train-00000-of-00004.parquet``); or
whatever ``load_dataset`` makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..settings.data import DEFAULT_SPLITS, DataSettings, divided
from .formats.answers import DESIRABLE, NUMBER_COLUMNS, NUMBERS, Edges
from .formats.converters import best_and_worst
from .formats.damage import naming_bad_text
from .formats.files import ONE_TABLE, open_source
from .formats.messages import MESSAGE_FIELDS, as_messages
from .formats.shapes import (
    ARGUMENTS,
    GROUPED,
    IMAGE_COLUMNS,
    PROMPT_LIKE,
    Shape,
    shape_of,
    standard_rows,
)
from .images.columns import checked_media
from .rows import ANSWER_MARK, RowProblem, attempt, read_row
from .table import TOKEN_COLUMNS, UNSCORED_COLUMNS, is_single, is_tokenized, reference_columns

if TYPE_CHECKING:
    from datasets import Dataset

_ADVICE = {
    "DatasetDict": "give one of its splits, such as data['train']",
    "IterableDataset": "lengths are planned before training: make one with "
    "Dataset.from_list(list(rows))",
    "DataFrame": "make one with Dataset.from_pandas(rows)",
    "str": "load_dataset makes one, and PreferenceConfig(dataset=...) with `widemargin train`",
    "dict": "make one with Dataset.from_dict(columns)",
}
"""How to get a data set from other things that hold one."""


@dataclass
class Part:
    """The first ``len(rows)`` of the ``available`` rows of one split of one source."""

    name: str
    split: str
    rows: Dataset
    available: int
    #: What became of its columns, in words.
    notes: list[str] = field(default_factory=list)

    def row_name(self, row: int) -> str:
        split = f" [{self.split}]" if self.split else ""
        return f"row {row} of {self.name}{split}"


def gather(settings: DataSettings, notes: list[str]) -> tuple[list[Part], list[Part]]:
    """The parts to train on and the parts to evaluate on; what is missing goes to ``notes``."""
    training: list[Part] = []
    evaluation: list[Part] = []
    train_splits, eval_splits = divided(settings.dataset_splits)
    for name, fraction in settings.mixture().items():
        tables = open_source(name, settings.dataset_splits, notes)
        training += _parts(tables, name, train_splits, fraction, settings)
        if settings.eval_dataset:
            continue
        if ONE_TABLE in tables:
            notes += [f"{name} is one table, all for training"] if eval_splits else []
            continue
        present = [split for split in eval_splits if _split_of(tables, split) is not None]
        if present != eval_splits and settings.dataset_splits == DEFAULT_SPLITS:
            notes.append(
                f"{name} has no split to evaluate on ({_splits_present(tables)}); dataset_splits "
                "names those to use"
            )
            continue
        evaluation += _parts(tables, name, eval_splits, 1.0, settings)
    if settings.eval_dataset:
        splits = eval_splits or [DEFAULT_SPLITS[1]]
        tables = open_source(settings.eval_dataset, splits, notes)
        evaluation += _parts(tables, settings.eval_dataset, splits, 1.0, settings)
    return training, evaluation


def _parts(
    tables: dict[str, Dataset],
    name: str,
    splits: list[str],
    fraction: float,
    settings: DataSettings,
) -> list[Part]:
    parts = []
    for split in splits[:1] if ONE_TABLE in tables else splits:
        table = tables.get(ONE_TABLE, _split_of(tables, split))
        if table is None:
            raise UserError(
                f"data set {name!r} has no split {split!r} ({_splits_present(tables)}); "
                "set dataset_splits: to those to use"
            )
        with naming_bad_text(name, table):
            several = settings.edges is not None
            rows, notes = checked_columns(name, table, settings.columns, several=several)
        head = rows.select(range(int(fraction * len(rows))))
        split = ONE_TABLE if ONE_TABLE in tables else split
        parts.append(Part(name, split, head, len(rows), notes))
    return parts


def _split_of(tables: dict[str, Dataset], split: str) -> Dataset | None:
    """The table of a split, whatever the case of its name."""
    names = [name for name in tables if name.casefold() == split.casefold()]
    return tables.get(split, tables[names[0]] if len(names) == 1 else None)


def _splits_present(tables: dict[str, Dataset]) -> str:
    return f"found: {', '.join(tables) or 'none'}"


def checked_columns(
    name: str, dataset: Any, renamed: Mapping[str, str] | None = None, *, several: bool = False
) -> tuple[Dataset, list[str]]:
    """``dataset`` with only the columns that matter, and what to say of the others.

    Args:
        name: what messages call the data set.
        dataset: the data set as it was given.
        renamed: names of columns here -> those in the data set.
        several: where rows have a pair and several answers, take the answers.

    Raises:
        UserError: there are no pairs in it, or pairs that cannot be read as they are.
    """
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not hasattr(dataset, "select"):
        kind = type(dataset).__name__
        advice = _ADVICE.get(kind, "make one with Dataset.from_list(rows)")
        raise UserError(f"{name}: expected a datasets.Dataset, got {kind}; {advice}")
    if is_tokenized(dataset):
        return _tokens_of(name, dataset, columns, renamed or {})
    dataset = _renamed(name, _in_python(name, dataset), renamed or {})
    columns = dataset.column_names
    if is_tokenized(dataset):
        return _tokens_of(name, dataset, columns, {})
    shape = shape_of(tuple(columns), several)
    if shape is None:
        raise UserError(
            f"data set {name!r} has the columns {', '.join(columns) or '(none)'}; expected prompt, "
            "chosen and rejected (or chosen and rejected that share their beginning); give their "
            "names in columns: {prompt: ..., chosen: ..., rejected: ...}; or prompt, completions "
            "and scores (or ranks), several answers a row; or prompt, completion and label, one"
        )
    dataset, images = checked_media(name, dataset, readable=shape.needs != GROUPED)
    read = [it for it in shape.reads(columns) if it not in IMAGE_COLUMNS or it in images]
    for column in read:
        if column not in images:
            _check_text(name, column, dataset.features[column])
    _check_prompt(name, dataset, shape, read)
    reference = reference_columns(columns)
    if shape.needs == GROUPED:  # they become pairs of those columns alone
        read, reference = list(GROUPED), []
    notes = [f"read as {shape.name}: {', '.join(read)}"] if shape.name else []
    if reference:
        notes.append(f"the reference's log-probs are its columns {', '.join(reference)}")
    given = [column for column in read if column in ARGUMENTS]
    notes += [f"the chat template is given its columns {', '.join(given)}"] if given else []
    notes += [f"{column}: {NUMBERS[column]}" for column in read if column in NUMBERS]
    unread = [column for column in columns if column not in (*read, *reference)]
    notes += [f"nothing reads its columns {', '.join(unread)}"] if unread else []
    if shape.needs == GROUPED:
        return _grouped(dataset.select_columns(read), notes), notes
    return dataset.select_columns([*read, *reference]), notes


def _tokens_of(
    name: str, dataset: Any, columns: list[str], renamed: Mapping[str, str]
) -> tuple[Dataset, list[str]]:
    checked_media(name, dataset, readable=False)
    known = (*TOKEN_COLUMNS, *UNSCORED_COLUMNS, *NUMBER_COLUMNS, *reference_columns(columns))
    kept = [column for column in known if column in columns]
    unread = [column for column in columns if column not in kept]
    notes = [f"nothing reads its columns {', '.join(unread)}"] if unread else []
    if renamed:
        notes.append("columns: its columns keep their names, since they hold token ids")
    return dataset.select_columns(kept), notes


def has_answers(dataset: Any) -> bool:
    """Whether the rows of checked columns have several answers."""
    shape = None if is_tokenized(dataset) else shape_of(tuple(dataset.column_names))
    return shape is not None and shape.answers is not None


def first_row_notes(dataset: Any, template: Any) -> list[str]:
    """What the first row of checked columns shows: text beside a template, fields of no effect."""
    if not template or is_tokenized(dataset) or not len(dataset):
        return []
    pairs = attempt(standard_rows, dataset[0], Edges())
    alike = {DESIRABLE: 1.0} if is_single(dataset) else {}
    pair = pairs if isinstance(pairs, RowProblem) else attempt(read_row, alike | pairs[0])
    if isinstance(pair, RowProblem):
        return []
    if not pair.conversation:
        return [
            "plain text: the chat template is not used; write prompts as messages, "
            "[{role: user, content: ...}], to use it"
        ]
    fields = {name for message in pair.prompt + pair.chosen + pair.rejected for name in message}
    unread = sorted(name for name in fields - MESSAGE_FIELDS if name not in str(template))
    return [f"nothing reads the fields {', '.join(unread)} of its messages"] if unread else []


def _check_text(name: str, column: str, kind: Any) -> None:
    """Refuse images, sound and the like, for which ``datasets`` opens the files a row names."""
    if hasattr(kind, "decode_example") and type(kind).__name__ != "Json":  # rows of mixed types
        raise UserError(
            f"data set {name!r}: its column {column} is of the kind {type(kind).__name__}, and "
            "rows could name files or hosts to open; make it a column of text"
        )
    parts = kind.values() if isinstance(kind, dict) else kind if isinstance(kind, list) else ()
    for part in (*parts, *filter(None, [getattr(kind, "feature", None)])):
        _check_text(name, column, part)


def _in_python(name: str, dataset: Any) -> Any:
    """``dataset`` without the format of arrays that ``with_format`` gave it."""
    form = dataset.format["type"]
    if form == "custom":
        raise UserError(
            f"{name}: set_transform computes its rows when they are read, which preparing them "
            "passes over; apply the function with .map"
        )
    return dataset if form is None else dataset.with_format(None)


def _renamed(name: str, dataset: Any, names: Mapping[str, str]) -> Any:
    columns = dataset.column_names
    missing = [theirs for theirs in names.values() if theirs not in columns]
    if missing:
        raise UserError(
            f"columns: data set {name!r} has no column {missing[0]!r}; it has {', '.join(columns)}"
        )
    names = {theirs: ours for ours, theirs in names.items() if ours != theirs}
    hidden = [ours for ours in names.values() if ours in columns and ours not in names]
    return dataset.remove_columns(hidden).rename_columns(names) if names else dataset


def _check_prompt(name: str, dataset: Any, shape: Shape, read: list[str]) -> None:
    """Raise ``UserError`` where there is no prompt but a column that seems to hold it."""
    if shape.needs != ("chosen", "rejected") or not len(dataset):
        return
    side = attempt(as_messages, dataset.select_columns(["chosen"])[0]["chosen"])
    answer = isinstance(side, str) and ANSWER_MARK not in side
    if isinstance(side, list) and side and isinstance(side[0], dict):
        answer = side[0].get("role") == "assistant"
    others = [column for column in dataset.column_names if column not in read]
    like = [it for it in others if it.casefold() in PROMPT_LIKE or _asks(name, dataset, it)]
    if answer and like:
        raise UserError(
            f"data set {name!r} has no column prompt, but {', '.join(like)}; set columns: "
            f"{{prompt: {like[0]}}}, or leave the column out if the answers hold the prompt"
        )


def _asks(name: str, dataset: Any, column: str) -> bool:
    """Whether a column of text or lists begins with messages, one of them a user's."""
    try:
        _check_text(name, column, dataset.features[column])
    except UserError:  # nor is it opened to look
        return False
    value = attempt(as_messages, dataset.select_columns([column])[0][column])
    roles = (
        [it.get("role") for it in value if isinstance(it, dict)] if isinstance(value, list) else []
    )
    return "user" in roles or "human" in roles


def _grouped(dataset: Any, notes: list[str]) -> Dataset:
    from datasets import Dataset

    pairs = best_and_worst(list(dataset))
    notes.append(f"{len(dataset):,} answers became {len(pairs):,} pairs of one prompt")
    return Dataset.from_list(pairs)
