"""Results: their folder, their files, records that survive a kill, and tables for the terminal."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from .. import files
from ..errors import UserError, refusals
from ..text import printable

Record = dict[str, Any]

SEAL = "crc32"
"""A record's checksum, in its line of the file."""
ELSEWHERE = "give another folder with --out"
"""How to have records of other settings."""


def output_folder(model: str, benchmark: str, out: Path | None) -> Path:
    """``out``, or ``MODEL/evaluation/BENCHMARK`` (``outputs/evaluation/NAME/...`` off the hub).

    The folder is made. A place that cannot be written is a ``UserError``.
    """
    if out is None:
        local = Path(model).expanduser()
        base = local / "evaluation" if local.is_dir() else Path("outputs/evaluation", name(model))
        out = base / benchmark
    with refusals(f"out {out}: cannot be written; give another folder with --out", OSError):
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    return out


def name(model: str) -> str:
    """The last part of a model's path or hub name.

    The folders ``merged`` and ``checkpoint-100``, which every run has, get their run's name before
    their own.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        return folder.name
    folder = folder.resolve()
    of_run = re.fullmatch(r"merged|checkpoint-\d+", folder.name)
    return f"{folder.parent.name}-{folder.name}" if of_run else folder.name


def write_text(path: Path, text: str) -> Path:
    """Put all of ``text`` at ``path``, or nothing."""
    with refusals(f"{path}: cannot be written", OSError):
        files.write_text(path, text)
    return path


def write_json(path: Path, content: Any) -> Path:
    """``content`` as indented JSON; numbers that are not finite become null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    return write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object a line."""
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns, the first to the left; numbers to three digits, nothing as a dash."""
    cells = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else printable(str(value), 60)


class Records:
    """``FOLDER/NAME.jsonl``: finished records by their ``id``; and the settings they came from.

    Lines are only ever added, each with its checksum, and on disk (fsync) when `append` returns. A
    last line that was cut off when the process was killed is dropped, so only unfinished work is
    lost, and no id is there twice. Use it as a context manager: one process at a time.

    Raises:
        UserError: the folder holds records of other settings (which ones is said), a line that is
            no record or was changed, or another process is at it.
    """

    def __init__(
        self, folder: Path, name: str, settings: Record, elsewhere: str = ELSEWHERE
    ) -> None:
        self.elsewhere = elsewhere
        self.path = folder / f"{name}.jsonl"
        self._settings_path = folder / f"{name}.settings.json"
        self._settings: Record = json.loads(json.dumps(settings))
        self._lock = Lock()
        self.done: dict[str, Record] = {}

    def __enter__(self) -> Records:
        with refusals(f"{self.path}: cannot be written", OSError):
            self._file = self.path.open("a+b")
        try:
            self._hold()
            self._check_settings()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, records: Iterable[Record]) -> None:
        """Add finished records, all in one write, and wait until they are on disk."""
        with self._lock, refusals(f"{self.path}: cannot be written", OSError):
            new = [record for record in records if record["id"] not in self.done]
            lines = (json.dumps(record | {SEAL: _seal(record)}) for record in new)
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self.done |= {record["id"]: record for record in new}

    def _hold(self) -> None:
        with suppress(ImportError):  # no fcntl on Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{self.path}: another process is writing to it; wait for it, or "
                    f"{self.elsewhere}"
                ) from error

    def _check_settings(self) -> None:
        empty = not self.path.stat().st_size
        if not self._settings_path.is_file():
            if not empty:
                raise UserError(
                    f"{self.path}: its {self._settings_path.name} is missing, so nobody knows its "
                    f"settings; {self.elsewhere}"
                )
        else:
            changes = self._changed_settings()
            if not changes:
                return
            if not empty:
                raise UserError(
                    f"{self.path.parent}: it holds results of other settings "
                    f"({'; '.join(changes)}); {self.elsewhere}, or the same settings to go on"
                )
        write_json(self._settings_path, self._settings)

    def _changed_settings(self) -> list[str]:
        """Each setting that differs from that of the records, with both values."""
        try:
            before = files.read_json(self._settings_path)
            keys = sorted(before.keys() | self._settings.keys())
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self._settings_path}: not readable ({error}); {self.elsewhere}"
            ) from error
        return [
            printable(f"{key}: {before.get(key)!r} before, {self._settings.get(key)!r} now", 200)
            for key in keys
            if before.get(key) != self._settings.get(key)
        ]

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        lines = content[: content.rfind(b"\n") + 1]
        self.done = _parsed(self.path, lines)
        if len(lines) < len(content):
            self._file.truncate(len(lines))
            os.fsync(self._file.fileno())


def read_records(folder: Path, name: str, remedy: str) -> tuple[Record, dict[str, Record]]:
    """The settings and the finished records by id, as `Records` wrote them to ``folder``.

    ``remedy`` says what to do where there are none.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise UserError(f"{remedy}; there is no {path}")
    with refusals(f"{path}: cannot be read", OSError, ValueError):
        settings = files.read_json(folder / f"{name}.settings.json")
        content = path.read_bytes()
    return settings, _parsed(path, content[: content.rfind(b"\n") + 1])


def _parsed(path: Path, lines: bytes) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            record = files.parse_json(line)
            if record.pop(SEAL) != _seal(record):
                raise ValueError("its checksum differs")
            records.setdefault(record["id"], record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: remove this line, and its record is made again; "
                "it is damaged"
            ) from error
    return records


def _seal(record: Record) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"
