"""Where in a file the trouble is: what is no UTF-8 or no JSON, by file, line and row."""

from __future__ import annotations

import gzip
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from ...files import parse_json

if TYPE_CHECKING:
    from datasets import Dataset


MOST_NESTED = 900
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_STEP = np.zeros(256, np.int8)
_STEP[[*b"[{"]], _STEP[[*b"]}"]] = 1, -1


def with_config(name: str) -> tuple[str, str | None]:
    """The path or hub name in ``name``, and the subset after a colon."""
    path = os.path.expanduser(name)
    before, colon, config = path.rpartition(":")
    if os.path.exists(path) or not colon or len(before) < 2 or re.search(r"[/\\]", config):
        return path, None
    return before, config


def cache_trouble() -> str:
    """What keeps datasets from writing its tables, and the remedy; nothing if it can."""
    from datasets import config

    folder = cache = Path(config.HF_DATASETS_CACHE).absolute()
    while not os.path.exists(folder):  # pathlib raises inside a folder that is closed to us
        folder = folder.parent
    if folder.is_dir() and os.access(folder, os.W_OK):
        return ""
    return f"set HF_HOME to a folder that can be written; its table goes to {cache}"


def unpacked_name(file: str) -> str:
    return file.removesuffix(".gz").removesuffix(".zst")


def opened(path: str) -> Any:
    import pyarrow as pa

    if path.endswith(".zst"):
        stream: Any = pa.CompressedInputStream(pa.OSFile(path), "zstd")
        return io.BufferedReader(stream)
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


@contextmanager
def naming_bad_text(name: str, rows: Dataset) -> Iterator[None]:
    """Say of text that is not UTF-8 where it stands; parquet and Arrow are read unchecked."""
    try:
        yield
    except UnicodeDecodeError as error:
        path, _ = with_config(name)
        paths = [path] if os.path.isfile(path) else sorted(Path(path).rglob("*"))
        where = next(filter(None, (trouble(str(p)) for p in paths if os.path.isfile(p))), "")
        row = next((i for i in range(len(rows)) if not _is_readable(rows, i)), "?")
        where = where or f"row {row} is not UTF-8 ({error.reason}); write it again from its source"
        raise UserError(f"data set {name!r}: {where}") from error


def _is_readable(rows: Dataset, row: int) -> bool:
    try:
        return rows[row] is not None
    except UnicodeDecodeError:
        return False


def trouble(path: str) -> str:
    """The first line of a file of text that is no UTF-8 or no JSON, in words; or ""."""
    ending = os.path.splitext(unpacked_name(path))[1]
    if ending not in (".jsonl", ".json", ".csv", ".tsv"):
        return ""
    name = os.path.basename(path)
    with opened(path) as file:
        for number, line in enumerate(file):
            row = f" (row {number})" if ending == ".jsonl" else ""
            where = f"{name}, line {number + 1}{row}"
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{where}, is not UTF-8 (byte 0x{line[error.start]:02x} at {error.start}); "
                    "convert it: iconv -f LATIN1 -t UTF-8, or whatever it was saved in"
                )
            if ending == ".jsonl" and text.strip():
                try:
                    parse_json(text.rstrip("\n"))
                except ValueError as error:
                    return f"{where}, is not JSON: {error}"
    return ""


def refuse_columns(name: str, path: str, rows: Dataset) -> None:
    """Raise ``UserError`` where one row of JSON is all rows by column, as pandas writes them."""
    columns = list(rows[0].values()) if len(rows) == 1 else []
    by_number = all(isinstance(it, dict) and "0" in it for it in columns)
    texts = all(isinstance(it, list) and it and isinstance(it[0], str) for it in columns)
    if columns and (by_number or texts):
        raise UserError(
            f"data set {name!r}: write {os.path.basename(path)} row by row (pandas: to_json(path, "
            "orient='records', lines=True)); it has its columns one after another"
        )


def nests_too_deeply(path: str) -> bool:
    """Whether JSON in a file is nested so deeply that a reader of pandas or pyarrow would crash."""
    level = lowest = 0
    with opened(path) as file:
        while block := file.read(1 << 24):  # brackets within strings count: a bound from above
            levels = level + _levels(block)
            least = np.minimum(lowest, np.minimum.accumulate(levels))
            if (levels - least).max() > MOST_NESTED:
                break
            level, lowest = levels[-1], least[-1]
        else:
            return False
    with opened(path) as file:
        return bool(_levels(_STRING.sub(b"", file.read())).max(initial=0) > MOST_NESTED)


def _levels(text: bytes) -> np.ndarray:
    return np.cumsum(_STEP[np.frombuffer(text, np.uint8)], dtype=np.int64)
