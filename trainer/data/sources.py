"""Names of data sets -> the raw rows that a run trains and evaluates on.

`gather` divides the settings' data sets into parts: the first rows of one split of one source.
`open_source` reads one name as a ``datasets.Dataset`` for each split. A name is a file, a folder or
a hub name. A folder is, in this order: something ``save_to_disk`` wrote; folders it wrote, named as
splits; files named as splits (``train.jsonl``, ``pairs_test.parquet``,
``train-00000-of-00004.parquet``); or whatever ``load_dataset`` makes of it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..settings.data import DEFAULT_SPLITS, DataSettings, is_training_split
from .table import RAW_COLUMNS, TOKEN_COLUMNS, UNSCORED_COLUMNS, is_tokenized

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_ENDINGS = (*_BUILDERS, ".jsonl.gz", ".json.gz")

#: The split name of a source that is one table, such as a file.
ONE_TABLE = ""

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

    def row_name(self, row: int) -> str:
        split = f" [{self.split}]" if self.split else ""
        return f"row {row} of {self.name}{split}"


def gather(settings: DataSettings, notes: list[str]) -> tuple[list[Part], list[Part]]:
    """The parts to train on and the parts to evaluate on; what is missing goes to ``notes``."""
    training: list[Part] = []
    evaluation: list[Part] = []
    train_splits = [split for split in settings.dataset_splits if is_training_split(split)]
    eval_splits = [split for split in settings.dataset_splits if not is_training_split(split)]
    for name, fraction in settings.mixture().items():
        tables = open_source(name, settings.dataset_splits)
        training += _parts(tables, name, train_splits, fraction)
        if settings.eval_dataset:
            continue
        if ONE_TABLE in tables:
            notes += [f"{name} is one table, all for training"] if eval_splits else []
            continue
        present = [split for split in eval_splits if split in tables]
        if present != eval_splits and settings.dataset_splits == DEFAULT_SPLITS:
            notes.append(f"{name} has no split to evaluate on ({_splits_present(tables)})")
            continue
        evaluation += _parts(tables, name, eval_splits, 1.0)
    if settings.eval_dataset:
        splits = eval_splits or [DEFAULT_SPLITS[1]]
        tables = open_source(settings.eval_dataset, splits)
        evaluation += _parts(tables, settings.eval_dataset, splits, 1.0)
    return training, evaluation


def _parts(tables: dict[str, Dataset], name: str, splits: list[str], fraction: float) -> list[Part]:
    parts = []
    for split in splits[:1] if ONE_TABLE in tables else splits:
        table = tables.get(ONE_TABLE, tables.get(split))
        if table is None:
            raise UserError(
                f"data set {name!r} has no split {split!r} ({_splits_present(tables)}); "
                "set dataset_splits: to those to use"
            )
        rows = checked_columns(name, table)
        head = rows.select(range(int(fraction * len(rows))))
        parts.append(Part(name, ONE_TABLE if ONE_TABLE in tables else split, head, len(rows)))
    return parts


def _splits_present(tables: dict[str, Dataset]) -> str:
    return f"found: {', '.join(tables) or 'none'}"


def checked_columns(name: str, dataset: Any) -> Dataset:
    """``dataset`` with only the columns that matter; an error where they are missing."""
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not hasattr(dataset, "select"):
        kind = type(dataset).__name__
        advice = _ADVICE.get(kind, "make one with Dataset.from_list(rows)")
        raise UserError(f"{name}: expected a datasets.Dataset, got {kind}; {advice}")
    if is_tokenized(dataset):
        columns = (*TOKEN_COLUMNS, *UNSCORED_COLUMNS)
        return dataset.select_columns([name for name in columns if name in dataset.column_names])
    if not {"chosen", "rejected"} <= set(columns):
        raise UserError(
            f"data set {name!r} has the columns {', '.join(columns) or '(none)'}; expected prompt, "
            "chosen and rejected (or chosen and rejected that share their beginning); rename its "
            "columns"
        )
    dataset = dataset.select_columns([column for column in RAW_COLUMNS if column in columns])
    for column, kind in dataset.features.items():
        _check_text(name, column, kind)
    return dataset


def _check_text(name: str, column: str, kind: Any) -> None:
    """Refuse images, sound and the like, for which ``datasets`` opens the files a row names."""
    if hasattr(kind, "decode_example"):
        raise UserError(
            f"data set {name!r}: its column {column} is of the kind {type(kind).__name__}, and "
            "rows could name files or hosts to open; make it a column of text"
        )
    parts = kind.values() if isinstance(kind, dict) else kind if isinstance(kind, list) else ()
    for part in (*parts, *filter(None, [getattr(kind, "feature", None)])):
        _check_text(name, column, part)


def open_source(name: str, splits: list[str]) -> dict[str, Dataset]:
    """The tables of ``name`` by split, at least those of ``splits`` that it has.

    A source of one table gives it under the name ``ONE_TABLE``.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        return {ONE_TABLE: _load_files(name, [path])}
    if os.path.isdir(path):
        return _open_folder(name, path, splits)
    if _looks_like_path(name):
        raise UserError(
            f"data set {name!r}: no such file or folder, as seen from {os.getcwd()}; "
            "correct the path, or give a hub name such as owner/data"
        )
    return _load_dataset(
        name,
        "it is no local file or folder, and the hub did not give it; check the name, the network, "
        "and access rights (hf auth login)",
    )


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith((*_ENDINGS, "/"))
        or "\\" in name
        or name.count("/") > 1
    )


def _open_folder(name: str, path: str, splits: list[str]) -> dict[str, Dataset]:
    from datasets import Dataset

    if _is_saved(path):
        saved = _load_saved(name, path)
        return {ONE_TABLE: saved} if isinstance(saved, Dataset) else dict(saved)
    subfolders = {s: os.path.join(path, s) for s in splits if _is_saved(os.path.join(path, s))}
    if subfolders:
        return {split: _load_saved(name, folder) for split, folder in subfolders.items()}
    files = {split: _split_files(path, split) for split in splits}
    if any(files.values()):
        return {split: _load_files(name, paths) for split, paths in files.items() if paths}
    return _load_below(
        name,
        path,
        f"it has no files named as the splits {', '.join(splits)}, and is no data set folder",
    )


def _load_below(name: str, path: str, advice: str) -> dict[str, Dataset]:
    """The data files below a folder, whatever its README.md names."""
    endings = {
        os.path.splitext(file.removesuffix(".gz"))[1]
        for _, _, files in os.walk(path)
        for file in files
        if file.endswith(_ENDINGS) and not file.startswith((".", "_"))
    }
    builders = {_BUILDERS[ending] for ending in endings}
    if len(builders) != 1:
        problem = "it has JSON and Parquet files" if builders else "no JSON or Parquet files in it"
        raise UserError(f"data set {name!r}: {advice} ({problem})")
    return _load_dataset(builders.pop(), advice, name=name, data_dir=path)


def _is_saved(path: str) -> bool:
    """Whether ``save_to_disk`` wrote ``path``."""
    return any(os.path.isfile(os.path.join(path, f)) for f in ("dataset_dict.json", "state.json"))


def _split_files(folder: str, split: str) -> list[str]:
    """The data files of ``folder`` whose names end with the split's, shard number aside."""
    pattern = re.compile(rf"(.*[-_.])?{re.escape(split)}(-\d+-of-\d+)?")
    stems = {file: _stem(file) for file in sorted(os.listdir(folder)) if file.endswith(_ENDINGS)}
    return [os.path.join(folder, file) for file, stem in stems.items() if pattern.fullmatch(stem)]


def _stem(file: str) -> str:
    return os.path.splitext(file.removesuffix(".gz"))[0]


def _load_files(name: str, paths: list[str]) -> Dataset:
    from datasets import load_dataset

    endings = {os.path.splitext(path.removesuffix(".gz"))[1] for path in paths}
    if len(endings) > 1 or not endings <= _BUILDERS.keys():
        raise UserError(
            f"data set {name!r}: cannot read {', '.join(sorted(map(os.path.basename, paths)))}; "
            f"expected files of one kind: {', '.join(_ENDINGS)}"
        )
    try:
        return load_dataset(_BUILDERS[endings.pop()], data_files=paths, split="train")
    except Exception as error:  # pyarrow, json and datasets each have their own
        raise UserError(f"data set {name!r}: cannot be read: {_cause(error)}") from error


def _load_saved(name: str, path: str) -> Any:
    from datasets import load_from_disk

    try:
        _check_names_inside(path)
        return load_from_disk(path)
    except Exception as error:
        raise UserError(f"data set {name!r}: cannot be read: {_cause(error)}") from error


def _check_names_inside(path: str) -> None:
    """Refuse a saved folder that names files outside of it."""
    index = os.path.join(path, "dataset_dict.json")
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            names = json.load(file)["splits"]
        folders = [os.path.join(path, _inside(name)) for name in names]
    else:
        folders = [path]
    for folder in folders:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            for entry in json.load(file)["_data_files"]:
                _inside(entry["filename"])


def _inside(name: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"it names {name!r}, which is not a file in its folder")
    return name


def _load_dataset(
    path: str, advice: str, *, name: str | None = None, data_dir: str | None = None
) -> dict[str, Dataset]:
    from datasets import load_dataset

    name = name or path
    try:
        return {str(s): table for s, table in load_dataset(path, data_dir=data_dir).items()}
    except Exception as error:  # connection, permission, builder: a dozen types, one meaning
        raise UserError(f"data set {name!r}: {advice} ({_cause(error)})") from error


def _cause(error: BaseException) -> str:
    """The first line of the error at the root of ``error``."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
