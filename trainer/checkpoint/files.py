"""Checkpoints that are complete or absent, and the choice of one to go on from.

A checkpoint is written in ``tmp-checkpoint-N`` of the run's folder, gets its manifest, is brought
to the disk, and only then becomes ``checkpoint-N``. A process killed anywhere on that way leaves
the earlier checkpoints as they were. What it left is removed when training starts again, or, where
its manifest holds, renamed. Removal renames first, too.

The manifest names the files with sizes and hashes, and the run. It is written last, so a folder
whose manifest holds was written to its end; a later change shows in a size or a hash. The hashes
tell of accidents, not of forgery.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import UserError
from ..files import digest, file_digest, read_json, sync_path, write_text

STAGING = "tmp-checkpoint-"
REMOVED = "tmp-removed-"
UPLOAD = "_upload-"
NAME = re.compile(r"checkpoint-(\d+)")
MANIFEST = "manifest.json"
FORMAT = 2
OPTIMIZERS = ("optimizer*", "global_step*")
"""Where an optimizer's state lies in a checkpoint: torch's or FSDP's, and DeepSpeed's."""

logger = logging.getLogger(__name__)


class BrokenCheckpoint(Exception):
    """A checkpoint that cannot be trusted; the message names the file and what is wrong with it."""


def choose_checkpoint(
    setting: str | bool | None,
    output_dir: str | Path,
    *,
    run: str | None = None,
    hashes: bool = True,
) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means; None to start from the beginning.

    Args:
        setting: a folder; True for the newest complete one in ``output_dir``; "auto" for that if
            there is one; None or False for none.
        output_dir: where the run saves.
        run: the id of the run that used the folder last, if it is known; see `newest_complete`.
        hashes: read and hash every file, instead of comparing sizes alone.

    Raises:
        UserError: the named one is broken, or none can be used.
    """
    if setting is None or setting is False:
        return None
    if setting is True or setting == "auto":
        newest, skipped, older = newest_complete(Path(output_dir), run=run, hashes=hashes)
        for line in (*skipped, *older):
            logger.warning("Passed over %s", line)
        if newest is not None or (setting == "auto" and not skipped):
            return newest
        skipped += older
        raise UserError(
            f"resume_from_checkpoint: {output_dir} holds no complete checkpoint"
            + (f" ({'; '.join(skipped)})" if skipped else "")
            + "; name one by its folder, or leave the setting out to start from the beginning"
        )
    folder = Path(setting)
    if not folder.is_dir():
        raise UserError(f"resume_from_checkpoint: {setting} is not a folder")
    if not (folder / MANIFEST).is_file():
        if not any(any(folder.glob(pattern)) for pattern in OPTIMIZERS):
            raise UserError(
                f"resume_from_checkpoint: {folder} has no optimizer's state; start a new run from "
                f"its weights: model_name_or_path: {folder}"
            )
        logger.warning(
            "%s has no manifest.json, as checkpoints from elsewhere: going on from it "
            "unchecked, trusting that it is complete and of this run",
            folder,
        )
        return folder
    try:
        check_files(folder, hashes=hashes)
    except BrokenCheckpoint as error:
        raise UserError(
            f"resume_from_checkpoint: {folder} is broken: {error}; name another checkpoint"
        ) from error
    return folder


def newest_complete(
    output_dir: Path, *, run: str | None = None, hashes: bool = True
) -> tuple[Path | None, list[str], list[str]]:
    """The complete checkpoint with the most steps of the run that began last.

    Also a line for each that is damaged and would come before it, and for those of earlier runs.

    Args:
        run: the id of that run; by default, the manifests say it.
    """
    folders = sorted(checkpoints_in(output_dir), key=_age, reverse=True)
    run = run or next(filter(None, map(run_of, folders)), None)
    damaged, older = [], []
    for folder in folders:
        try:
            manifest = check_files(folder, hashes=hashes and run_of(folder) == run)
        except BrokenCheckpoint as error:
            damaged.append(f"{folder}: {error}")
            continue
        if manifest["run"].get("id") == run:
            return folder, damaged, older
        older.append(f"{folder}: it is of an earlier run")
    return None, damaged, older


def run_of(folder: Path | None) -> str | None:
    """The id of the run that a checkpoint is of, where its manifest can be read."""
    try:
        return None if folder is None else read_manifest(folder)["run"].get("id")
    except BrokenCheckpoint:
        return None


def _age(folder: Path) -> tuple[float, int]:
    """Sorts by the start of the process that saved a checkpoint, then by step."""
    try:
        return float(read_manifest(folder)["run"].get("started", 0.0)), step_of(folder)
    except BrokenCheckpoint:
        return math.inf, step_of(folder)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Folders named as checkpoints, in no order."""
    entries = output_dir.iterdir() if output_dir.is_dir() else ()
    return [p for p in entries if NAME.fullmatch(p.name) and p.is_dir()]


def step_of(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def publish(staging: Path, folder: Path) -> None:
    """Rename a complete checkpoint from its staging folder to its own name.

    One of that name, of an earlier run or broken, is put where the new one was; if the process
    dies between the two renames, `settle_leftovers` completes the second.
    """
    written = staging / folder.name
    if folder.exists():
        folder.rename(staging / "replaced")
    written.rename(folder)
    sync_path(folder.parent)
    shutil.rmtree(staging, ignore_errors=True)


def settle_leftovers(output_dir: Path) -> None:
    """Rename or remove what a process that died left behind."""
    for staging in output_dir.glob(f"{STAGING}*"):
        folder = output_dir / staging.name.removeprefix("tmp-")
        if not folder.exists() and (staging / folder.name).is_dir():
            try:
                check_files(staging / folder.name)
            except BrokenCheckpoint:
                pass
            else:
                (staging / folder.name).rename(folder)
        shutil.rmtree(staging, ignore_errors=True)
    for left in (*output_dir.glob(f"{REMOVED}*"), *output_dir.glob(f"{UPLOAD}*")):
        shutil.rmtree(left, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: list[Path]) -> None:
    """Remove the oldest checkpoints over ``limit``, none of ``keep`` among them.

    Those that are damaged go first, then those of earlier runs.
    """
    if limit is None or limit <= 0:
        return
    kept = {folder.resolve() for folder in keep}
    checkpoints = checkpoints_in(output_dir)
    others = [folder for folder in checkpoints if folder.resolve() not in kept]
    others.sort(key=lambda folder: (not math.isinf(_age(folder)[0]), _age(folder)))
    for folder in others[: max(0, len(checkpoints) - limit)]:
        gone = output_dir / f"{REMOVED}{step_of(folder)}"
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def could_not_write(error: BaseException) -> bool:
    """Whether ``error`` says that a file could not be written: a full disk, a quota, a limit.

    Libraries in Rust and C++ raise exceptions of no kind of their own (tokenizers a bare
    ``Exception``); their texts hold the system's.
    """
    if isinstance(error, OSError | SafetensorError):
        return True
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    words = ["PytorchStreamWriter", "inline_container", "iostream error"]
    words += map(os.strerror, numbers)
    return type(error) in (Exception, RuntimeError) and any(w in str(error) for w in words)


def write_manifest(folder: Path, step: int, run: dict[str, Any]) -> None:
    """Hash every file of ``folder`` and bring all of it to the disk, the manifest last.

    Args:
        folder: of a checkpoint that lacks nothing else.
        step: of the run, in optimizer steps.
        run: facts about the run, of plain JSON types, that a resumed one is compared with.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths if path.name != MANIFEST]
    entries = _in_threads(lambda name: _synced_entry(folder / name), names)
    content = {"format": FORMAT, "step": step, "run": run}
    content["files"] = dict(zip(names, entries, strict=True))
    write_text(folder / MANIFEST, _text(content), sync=True)
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_path(inner)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest's content.

    Raises:
        BrokenCheckpoint: there is none, or it is not as it was written.
    """
    try:
        content = read_json(folder / MANIFEST)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{MANIFEST} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BrokenCheckpoint(f"{MANIFEST} is not one of this version")
    text = (folder / MANIFEST).read_text(encoding="utf-8")
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
        hashed = _in_threads(lambda name: file_digest(folder / name), names)
        for name, value in zip(names, hashed, strict=True):
            if value != content["files"][name]["blake2b"]:
                raise BrokenCheckpoint(f"{name} does not have the hash it was saved with")
    return content


def _synced_entry(path: Path) -> dict[str, Any]:
    sync_path(path)
    return {"bytes": path.stat().st_size, "blake2b": file_digest(path)}


def _in_threads(work: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
    """Hashing and reading release the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(work, names))


def _digest(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "digest"}
    return digest([json.dumps(rest, sort_keys=True)], size=32)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content | {"digest": _digest(content)}, indent=1, sort_keys=True) + "\n"
