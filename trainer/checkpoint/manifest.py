"""The manifest of a checkpoint: its files with sizes and hashes, and the run it belongs to.

It is written last, so a folder with a manifest that holds was written to its end; whatever befell
it since shows in a size or a hash. The hashes tell of accidents, not of forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
_CHUNK = 2**22


class BrokenCheckpoint(Exception):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong with it."""


def write_manifest(folder: Path, step: int, run: dict[str, Any]) -> None:
    """Hash every file of ``folder`` and bring all of it to the disk, the manifest last.

    Args:
        folder: of a checkpoint that lacks nothing else.
        step: of the run, in optimizer steps.
        run: facts about the run, of plain JSON types, that a resumed one is compared with.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths if path.name != MANIFEST]
    entries = _in_threads(lambda name: _settled_entry(folder / name), names)
    content = {"format": FORMAT, "step": step, "run": run}
    content["files"] = dict(zip(names, entries, strict=True))
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(_text(content))
        file.flush()
        os.fsync(file.fileno())
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_folder(inner)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content.

    Raises:
        BrokenCheckpoint: there is none, or it is not as it was written.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{MANIFEST} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BrokenCheckpoint(f"{MANIFEST} is not one of this version")
    if content.get("digest") != _digest(content) or text != _text(content):
        raise BrokenCheckpoint(f"{MANIFEST} is not as it was written")
    return content


def check_files(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """The manifest's content, once every file is there in its size and (``hashes``) with its hash.

    Raises:
        BrokenCheckpoint: naming the first file that is not as it was saved.
    """
    content = read_manifest(folder)
    for name, entry in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpoint(f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise BrokenCheckpoint(
                f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
            )
    if hashes:
        names = list(content["files"])
        found = _in_threads(lambda name: _hash(folder / name), names)
        for name, digest in zip(names, found, strict=True):
            if digest != content["files"][name]["blake2b"]:
                raise BrokenCheckpoint(f"{name} does not have the hash it was saved with")
    return content


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries, such as one just renamed, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settled_entry(path: Path) -> dict[str, Any]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": path.stat().st_size, "blake2b": _hash(path)}


def _hash(path: Path) -> str:
    content = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            content.update(chunk)
    return content.hexdigest()


def _in_threads(work: Any, names: Iterable[str]) -> list[Any]:
    """Hashing and reading release the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(work, names))


def _digest(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content | {"digest": _digest(content)}, indent=1, sort_keys=True) + "\n"
