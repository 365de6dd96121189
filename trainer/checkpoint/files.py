"""Checkpoints that are complete or absent, and the choice of one to go on from.

A checkpoint is written aside, in ``tmp-checkpoint-N`` of the same folder, gets its manifest, is
brought to the disk, and only then renamed to ``checkpoint-N``. A process killed anywhere on that
way leaves the checkpoints before it as they were; what lies aside is removed, or, where its
manifest holds, put in its place when training starts again. Removal renames first, too.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError
from .manifest import BrokenCheckpoint, check_files, sync_folder

ASIDE = "tmp-checkpoint-"
REMOVED = "tmp-removed-"
NAME = re.compile(r"checkpoint-(\d+)")

logger = logging.getLogger(__name__)


def choose_checkpoint(
    wanted: str | bool | None, output_dir: str | Path, *, hashes: bool = True, quiet: bool = False
) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means; None to start from the beginning.

    Args:
        wanted: a folder; True for the newest complete one in ``output_dir``; "auto" for that if
            there is one; None or False for none.
        output_dir: where the run saves.
        hashes: read and hash every file, instead of comparing sizes alone.
        quiet: do not warn of what was passed over.

    Raises:
        UserError: the named one is broken, or none can be used.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is True or wanted == "auto":
        found, skipped = newest_complete(Path(output_dir), hashes=hashes)
        for line in () if quiet else skipped:
            logger.warning("Passed over %s", line)
        if found is not None or (wanted == "auto" and not skipped):
            return found
        raise UserError(
            f"resume_from_checkpoint: {output_dir} holds no complete checkpoint"
            + (f" ({'; '.join(skipped)})" if skipped else "")
            + "; name one by its folder, or leave the setting out to start anew"
        )
    folder = Path(wanted)
    if not folder.is_dir():
        raise UserError(f"resume_from_checkpoint: {wanted} is not a folder")
    if not (folder / "manifest.json").is_file():
        if not quiet:
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


def newest_complete(output_dir: Path, *, hashes: bool = True) -> tuple[Path | None, list[str]]:
    """The complete checkpoint with the most steps, and a line for each newer one that is not."""
    skipped = []
    for folder in sorted(checkpoints_in(output_dir), key=step_of, reverse=True):
        try:
            check_files(folder, hashes=hashes)
        except BrokenCheckpoint as error:
            skipped.append(f"{folder}: {error}")
        else:
            return folder, skipped
    return None, skipped


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Folders named as checkpoints, in no order."""
    if not output_dir.is_dir():
        return []
    return [p for p in output_dir.iterdir() if NAME.fullmatch(p.name) and p.is_dir()]


def step_of(folder: Path) -> int:
    found = NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1])


def publish(aside: Path, folder: Path) -> None:
    """Give a checkpoint written aside, with its manifest, its name.

    One of that name, of an earlier run or broken, is put where the new one was; if the process
    dies between the two renames, `settle_leftovers` completes the second.
    """
    written = aside / folder.name
    if folder.exists():
        folder.rename(aside / "replaced")
    written.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def settle_leftovers(output_dir: Path) -> None:
    """Finish or remove what a process that died left aside."""
    if not output_dir.is_dir():
        return
    for aside in output_dir.glob(f"{ASIDE}*"):
        folder = output_dir / aside.name.removeprefix("tmp-")
        if not folder.exists() and (aside / folder.name).is_dir():
            try:
                check_files(aside / folder.name)
            except BrokenCheckpoint:
                pass
            else:
                (aside / folder.name).rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    for removed in output_dir.glob(f"{REMOVED}*"):
        shutil.rmtree(removed, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: list[Path]) -> None:
    """Remove the oldest checkpoints over ``limit``, none of ``keep`` among them."""
    if limit is None or limit <= 0:
        return
    kept = {folder.resolve() for folder in keep}
    found = checkpoints_in(output_dir)
    others = [folder for folder in found if folder.resolve() not in kept]
    others.sort(key=lambda folder: (folder.stat().st_mtime_ns, step_of(folder)))
    for folder in others[: max(0, len(found) - limit)]:
        gone = output_dir / f"{REMOVED}{step_of(folder)}"
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def could_not_write(error: BaseException) -> bool:
    """Whether ``error`` says that a file could not be written: a full disk, a quota, a limit."""
    if isinstance(error, OSError | SafetensorError):
        return True
    words = ("PytorchStreamWriter", "inline_container", "iostream error", os.strerror(errno.ENOSPC))
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
