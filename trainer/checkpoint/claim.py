"""One run at a time in an output folder, and the name of the run that was there last.

The first rank holds a lock on ``.running`` while a run uses the folder. The system drops the lock
when the process dies. A run that ends well removes the file; one that stopped leaves its id there,
so `files` tells its checkpoints from those of earlier runs.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import read_json, write_at

CLAIM = ".running"

_held: dict[str, int] = {}
"""Open files by folder, of this process."""

logger = logging.getLogger(__name__)


@contextmanager
def claimed(output_dir: str | Path) -> Iterator[None]:
    """Inside, no other process may claim the folder; this one may again.

    Raises:
        UserError: another run uses it, or it cannot be written.
    """
    folder = os.path.realpath(output_dir)
    if folder in _held:
        yield
        return
    path = Path(folder, CLAIM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"output_dir: {output_dir} cannot be written: {error.strerror}") from error
    try:
        _lock(descriptor, output_dir)
        _held[folder] = descriptor
        yield
        path.unlink(missing_ok=True)
    finally:
        _held.pop(folder, None)
        os.close(descriptor)


def name_run(output_dir: str | Path, run: str) -> None:
    """Write the id of the run that begins or goes on in the folder, which this process holds."""
    text = json.dumps({"run": run, "host": socket.gethostname(), "process": os.getpid()})
    write_at(_held[os.path.realpath(output_dir)], text)


def last_run(output_dir: str | Path) -> str | None:
    """The id of a run that has not ended well; None if there is none."""
    descriptor = _held.get(os.path.realpath(output_dir))
    if descriptor is not None:  # to close the file a second time would drop the lock
        return _content(descriptor).get("run")
    try:
        content = read_json(Path(output_dir, CLAIM))
    except (OSError, ValueError):
        return None
    return content.get("run") if isinstance(content, dict) else None


def _lock(descriptor: int, output_dir: str | Path) -> None:
    try:
        import fcntl  # not inherited by worker processes, which may outlive a killed run
    except ImportError:  # on Windows
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = _content(descriptor)
        who = f" (process {owner.get('process')} on {owner.get('host')})" if owner else ""
        raise UserError(
            f"output_dir: wait for the run that uses {output_dir}{who}, or name another folder"
        ) from error
    except OSError as error:  # a network disk without locks
        logger.warning("%s cannot be locked (%s): start one run in it at a time", output_dir, error)


def _content(descriptor: int) -> dict[str, str]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
