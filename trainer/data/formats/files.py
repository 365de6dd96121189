"""Files, folders and hub names -> tables by split."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...files import replacing
from .damage import (
    cache_trouble,
    nests_too_deeply,
    opened,
    refuse_columns,
    trouble,
    unpacked_name,
    with_config,
)

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".zst")
_ENDINGS = (*_BUILDERS, *(f"{ending}{packed}" for ending in _BUILDERS for packed in _PACKED))

#: The split name of a source that is one table, such as a file.
ONE_TABLE = ""


def open_source(name: str, splits: list[str], notes: list[str]) -> dict[str, Dataset]:
    """The tables of ``name`` by split, at least those of ``splits`` that it has.

    A source of one table gives it under the name ``ONE_TABLE``. Files of a folder that nothing
    reads go to ``notes``.
    """
    from datasets import load_dataset

    path, config = with_config(name)
    if os.path.isfile(path):
        return {ONE_TABLE: load_files(name, [path])}
    if os.path.isdir(path):
        return _open_folder(name, path, splits, notes)
    if _looks_like_path(name):
        raise UserError(
            f"data set {name!r}: no such file or folder, as seen from {os.getcwd()}; "
            "correct the path, or give a hub name such as owner/data"
        )
    try:
        tables = load_dataset(path, config)
    except Exception as error:  # connection, permission, builder: a dozen types, one meaning
        raise UserError(
            f"data set {name!r}: it is no local file or folder, and the hub did not give it; check "
            "the name (a subset is owner/data:subset), the network, and access rights (hf auth "
            f"login) ({cause(error)})"
        ) from error
    return {str(split): table for split, table in tables.items()}


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith((*_ENDINGS, "/"))
        or "\\" in name
        or name.count("/") > 1
    )


def _open_folder(name: str, path: str, splits: list[str], notes: list[str]) -> dict[str, Dataset]:
    from datasets import Dataset

    if _is_saved(path):
        saved = _load_saved(name, path)
        return {ONE_TABLE: saved} if isinstance(saved, Dataset) else dict(saved)
    entries = sorted(os.listdir(path))
    named = {s: [e for e in entries if e.casefold() == s.casefold()] for s in splits}
    saved = {s: os.path.join(path, e[0]) for s, e in named.items() if e}
    saved = {split: folder for split, folder in saved.items() if _is_saved(folder)}
    if saved:
        return {split: _load_saved(name, folder) for split, folder in saved.items()}
    files = {split: _split_files(path, split) for split in splits}
    if any(files.values()):
        taken = {file for paths in files.values() for file in paths}
        left = [e for e in entries if e.endswith(_ENDINGS) and os.path.join(path, e) not in taken]
        notes += [f"{name}: no split of dataset_splits reads {', '.join(left)}"] if left else []
        for split, paths in files.items():
            _check_alike(name, split, paths)
        return {split: load_files(name, paths) for split, paths in files.items() if paths}
    return _load_below(
        name,
        path,
        f"it has no files named as the splits {', '.join(splits)}, and is no data set folder",
    )


def _load_below(name: str, path: str, advice: str) -> dict[str, Dataset]:
    """The data files below a folder, whatever its README.md names."""
    from datasets import load_dataset_builder

    endings = {
        os.path.splitext(unpacked_name(file))[1]
        for _, _, files in os.walk(path)
        for file in files
        if file.endswith(_ENDINGS) and not file.startswith((".", "_"))
    }
    builders = {_BUILDERS[ending] for ending in endings}
    if len(builders) != 1:
        found = " and ".join(sorted(builders))
        problem = f"it has {found} files" if found else "it has no data files"
        raise UserError(f"data set {name!r}: {advice} ({problem})")
    try:
        files: Any = load_dataset_builder(builders.pop(), data_dir=path).config.data_files
    except Exception as error:
        raise UserError(f"data set {name!r}: {advice} ({cause(error)})") from error
    for split, paths in files.items():
        _check_alike(name, str(split), paths)
    return {str(split): load_files(name, list(map(str, paths))) for split, paths in files.items()}


def _is_saved(path: str) -> bool:
    """Whether ``save_to_disk`` wrote ``path``."""
    return any(os.path.isfile(os.path.join(path, f)) for f in ("dataset_dict.json", "state.json"))


def _split_files(folder: str, split: str) -> list[str]:
    """The data files of ``folder`` whose names end with the split's, shard number aside."""
    pattern = re.compile(rf"(.*[-_.])?{re.escape(split)}(-\d+-of-\d+)?", re.IGNORECASE)
    files = [file for file in sorted(os.listdir(folder)) if file.endswith(_ENDINGS)]
    stems = [os.path.splitext(unpacked_name(file))[0] for file in files]
    named = zip(files, stems, strict=True)
    return [os.path.join(folder, file) for file, stem in named if pattern.fullmatch(stem)]


def _check_alike(name: str, split: str, paths: list[str]) -> None:
    """Raise ``UserError`` where files that are no shards of one would become one split."""
    if len({re.sub(r"\d+", "", os.path.basename(path)) for path in paths}) > 1:
        found = ", ".join(sorted(map(os.path.basename, paths)))
        raise UserError(
            f"data set {name!r}: all of {found} would become one split, {split!r}; name files as "
            "their splits (train.jsonl, test.jsonl), or give the files to use one by one as "
            "dataset and eval_dataset, or in dataset_mixer"
        )


def load_files(name: str, paths: list[str]) -> Dataset:
    """The rows of some files of one kind."""
    from datasets import load_dataset

    endings = {os.path.splitext(unpacked_name(path))[1] for path in paths}
    if len(endings) > 1 or not endings <= _BUILDERS.keys():
        raise UserError(
            f"data set {name!r}: cannot read {', '.join(sorted(map(os.path.basename, paths)))}; "
            f"expected files of one kind: {', '.join(_BUILDERS)}, or one of them packed as "
            f"{' or '.join(_PACKED)}"
        )
    ending = endings.pop()
    try:
        _check_content(name, paths)
        options = _table_options(name, ending, paths) if _BUILDERS[ending] == "csv" else {}
        unpacked = [_without_zstd(path) for path in paths]
        rows = load_dataset(_BUILDERS[ending], data_files=unpacked, split="train", **options)
        if _BUILDERS[ending] == "json":
            refuse_columns(name, paths[0], rows)
        return rows
    except UserError:
        raise
    except Exception as error:  # pyarrow, json and datasets each have their own
        where = next(filter(None, map(trouble, paths)), "") or cache_trouble() or cause(error)
        raise UserError(f"data set {name!r}: cannot be read: {where}") from error


def _check_content(name: str, paths: list[str]) -> None:
    for path in paths:
        with opened(path) as file:
            start = file.read(4096)
        if not start.strip() or start.split() == [b"[]"]:
            raise UserError(f"data set {name!r}: {os.path.basename(path)} is empty; leave it out")
        if ".json" in os.path.basename(path):
            rows = re.match(rb"(\xef\xbb\xbf)?\s*(\[\s*)?\{", start)
            if not rows or nests_too_deeply(path):  # either can crash pyarrow's or pandas' reader
                problem = "is nested too deeply" if rows else "begins with no row"
                raise UserError(
                    f"data set {name!r}: {os.path.basename(path)} {problem}; write JSON objects "
                    "with prompt, chosen and rejected"
                )


def _table_options(name: str, ending: str, paths: list[str]) -> dict[str, Any]:
    """How a CSV file is read: every value as the text that it is, "NA" and "42" too.

    Its separator is the tab of TSV, or what stands most often between the names of its columns.
    """
    from datasets import Features, Value

    with opened(paths[0]) as file:
        first = file.readline().decode("utf-8-sig")
    separator = "\t" if ending == ".tsv" else max(",;\t", key=first.count)
    header = next(csv.reader([first.rstrip("\r\n")], delimiter=separator), [])
    for path in paths:
        _check_widths(name, path, len(header), separator)
    columns = [column or f"Unnamed: {i}" for i, column in enumerate(header)]  # pandas' name
    features = Features({column: Value("string") for column in columns})
    return {"sep": separator, "features": features, "keep_default_na": False}


def _check_widths(name: str, path: str, columns: int, separator: str) -> None:
    """Raise ``UserError`` for a line with more values than columns, which pandas would shift."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        lines = csv.reader(text, delimiter=separator)
        for values in lines:
            if len(values) > columns:
                raise UserError(
                    f"data set {name!r}: {os.path.basename(path)}, line {lines.line_num}, has "
                    f"{len(values)} values for {columns} columns; put text that holds "
                    f"{separator!r} between double quotes"
                )
        if lines.line_num < 2:
            raise UserError(
                f"data set {name!r}: {os.path.basename(path)} has no rows; leave it out"
            )


def _without_zstd(path: str) -> str:
    """``path``, or for a .zst file a copy that is unpacked, kept by name, size and time."""
    from datasets import config
    from datasets.fingerprint import Hasher

    if not path.endswith(".zst"):
        return path
    state = os.stat(path)
    key = Hasher.hash([os.path.abspath(path), state.st_size, state.st_mtime_ns])
    folder = Path(config.HF_DATASETS_CACHE, "widemargin", f"unpacked-{key}")
    copy = folder / os.path.basename(path).removesuffix(".zst")
    if not copy.is_file():
        with replacing(copy) as aside, opened(path) as packed, open(aside, "wb") as file:
            shutil.copyfileobj(packed, file)
    return str(copy)


def _load_saved(name: str, path: str) -> Any:
    from datasets import load_from_disk

    try:
        _check_names_inside(path)
        return load_from_disk(path)
    except Exception as error:
        raise UserError(f"data set {name!r}: cannot be read: {cause(error)}") from error


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


def cause(error: BaseException) -> str:
    """The first line of the error at the root of ``error``."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
