"""Where a run begins: in a folder of its own, at the checkpoint that it goes on from, on its date.

The first rank holds a lock on ``.running`` while a run uses the folder. The system drops the lock
when the process dies. A run that ends well removes the file; one that stopped leaves its id there,
so `files` tells its checkpoints from those of earlier runs. Whether a run may go on from a
checkpoint, `same_run` decides.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from ..data.template import writes_date
from ..errors import UserError
from ..files import read_json, write_at
from .files import (
    MANIFEST,
    BrokenCheckpoint,
    check_files,
    choose_checkpoint,
    newest_complete,
    read_manifest,
    run_of,
    settle_leftovers,
)
from .same_run import Facts, compare

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..settings.config import PreferenceConfig

CLAIM = ".running"
LATE_S = 5

_held: dict[str, int] = {}
"""Open files by folder, of this process."""

T = TypeVar("T")
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


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint whose files have been checked, or at the beginning.

    ``run`` is the run's id, which all of its checkpoints carry.
    """

    folder: Path | None
    run: str


@contextmanager
def output_claimed(args: TrainingArguments) -> Iterator[None]:
    """Inside, the output folder is this run's alone; a collective with several ranks."""
    with ExitStack() as stack:
        on_first_rank(args, lambda: stack.enter_context(claimed(str(args.output_dir))))
        check_shared(args)
        yield


def check_shared(args: TrainingArguments) -> None:
    """Raise ``UserError`` on every rank if several disks hold ``output_dir``, and one is expected.

    Or the reverse, with ``save_on_each_node``. A collective with several ranks, after the first
    rank made the folder.
    """
    if args.world_size == 1:
        return
    folder = Path(str(args.output_dir))
    probe = folder / on_first_rank(args, lambda: f".shared-{uuid.uuid4().hex}")
    if args.process_index == 0:
        probe.touch()
    dist.barrier()
    told: list[Any] = [None] * args.world_size
    dist.all_gather_object(told, (_appears(probe), args.local_process_index == 0))
    if args.process_index == 0:
        probe.unlink(missing_ok=True)
    apart = [str(rank) for rank, (sees, _) in enumerate(told) if not sees]
    if args.save_on_each_node and any(sees and first for sees, first in told[1:]):
        raise UserError(
            f"save_on_each_node: set it to false; several machines see one {folder}, and would "
            "write over each other's checkpoints"
        )
    if apart and not args.save_on_each_node:
        raise UserError(
            f"output_dir: name a folder on a disk that all machines share, or set "
            f"save_on_each_node: true; ranks {', '.join(apart[:8])} do not see what the first rank "
            f"writes in {folder}, and no run could go on from such checkpoints"
        )


def _appears(path: Path) -> bool:
    """Whether the path is there, or soon: a network disk may show it late."""
    until = time.monotonic() + LATE_S
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def start_of_run(args: TrainingArguments, setting: str | bool | None) -> Start:
    """The checkpoint that ``resume_from_checkpoint`` means, read and hashed by the first rank.

    What a process that died left in ``output_dir`` is settled first. A collective with several
    ranks; see `choose_checkpoint`. Call it inside `output_claimed`.
    """
    folder = str(args.output_dir)

    def choose() -> Start:
        settle_leftovers(Path(folder))
        checkpoint = choose_checkpoint(setting, folder, run=last_run(folder))
        start = Start(checkpoint, run_of(checkpoint) or uuid.uuid4().hex)
        name_run(folder, start.run)
        return start

    return on_first_rank(args, choose)


def on_first_rank(args: TrainingArguments, work: Callable[[], T]) -> T:
    """What ``work`` returns on the first rank, or its ``UserError``, on every rank."""
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    if args.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def check_same_run(checkpoint: Path, now: Facts) -> None:
    """Raise ``UserError`` for a checkpoint of another run; warn of what differs and may."""
    if not (checkpoint / MANIFEST).is_file():
        return
    forbidden, notes = compare(check_files(checkpoint, hashes=False)["run"], now)
    if forbidden:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is of another run: {'; '.join(forbidden)}. "
            "Set what it was, or start a new run from its weights: model_name_or_path: "
            f"{checkpoint}, with resume_from_checkpoint: false"
        )
    for note in notes:
        logger.warning("Going on from %s: %s", checkpoint, note)


def settle_date(config: PreferenceConfig, tokenizer: Any, fresh: bool = False) -> None:
    """Set ``chat_date`` where the chat template writes the date: the checkpoint's, or today's.

    The date is the same on all ranks, and on every day on which the run goes on. A ``fresh`` run
    goes on from no checkpoint, whatever the folder holds.
    """
    if config.chat_date is not None or not writes_date(tokenizer):
        return
    fresh = fresh or config.resume_from_checkpoint is False
    config.chat_date = on_first_rank(
        config,
        lambda: (None if fresh else _saved_date(config)) or datetime.date.today().isoformat(),
    )


def _saved_date(config: PreferenceConfig) -> str | None:
    """The date of the checkpoint that the run would go on from."""
    named = config.resume_from_checkpoint
    folder = Path(named) if isinstance(named, str) and named not in ("auto", "True") else None
    if folder is None:
        folder, *_ = newest_complete(Path(str(config.output_dir)), hashes=False)
    try:
        return (
            None
            if folder is None
            else read_manifest(folder)["run"].get("settings", {}).get("chat_date")
        )
    except BrokenCheckpoint:
        return None
