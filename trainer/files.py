"""Files that are written completely or not at all, and digests of contents.

Other libraries write some files in place. `seal` adds their digests in a file beside them, and
`is_sealed` says whether they are as they were then.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHUNK = 2**22


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in ``path``'s folder, for the caller to write; then it becomes ``path``.

    If writing fails, ``path`` stays as it was and the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Replace ``path`` by a file with this text; ``sync`` waits until the disk has it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        if sync:
            sync_path(temporary)


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        OSError: it cannot be read, or is no file: to open a pipe would wait for its writer.
        ValueError: it is no JSON, or nested too deeply.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, also where a text is nested too deeply or a number too long.

    Raises:
        ValueError: it is no JSON; a ``JSONDecodeError`` if it is text.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise json.JSONDecodeError("a number has too many digits", "", 0) from None


def write_at(descriptor: int, text: str) -> None:
    """Replace the content of an open file, whose lock goes with the file itself."""
    content = text.encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))


def sync_path(path: Path) -> None:
    """Wait until the disk has a file, or a folder's entries, such as one just renamed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(chunks: Iterable[str | bytes | memoryview], size: int = 16) -> str:
    """The BLAKE2b digest of the chunks joined together, ``size`` bytes as hexadecimal digits."""
    content = hashlib.blake2b(digest_size=size)
    for chunk in chunks:
        content.update(chunk.encode() if isinstance(chunk, str) else chunk)
    return content.hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file's content, read piece by piece."""

    def chunks() -> Iterator[bytes]:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk

    return digest(chunks(), size=32)


def seal(seal_file: Path, paths: Iterable[Path]) -> None:
    """Write the files' digests to ``seal_file``, once their content is on the disk."""
    digests = {}
    for path in sorted(paths):
        sync_path(path)
        digests[path.name] = file_digest(path)
    write_text(seal_file, json.dumps(digests))


def is_sealed(seal_file: Path, paths: Iterable[Path]) -> bool:
    """Whether ``seal_file`` names these files, no other, with the digests they have."""
    try:
        saved = read_json(seal_file)
    except (OSError, ValueError):
        return False
    return saved == {path.name: file_digest(path) for path in paths}
