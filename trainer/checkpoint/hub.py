"""The hub: what is uploaded of a run, and refusals in one line.

An upload is of a folder in ``output_dir`` made for it, with the files to share: the model, the
card, the report, and what is known of the run without paths of this machine. Other files stay here.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers.trainer
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..errors import refusals
from ..model.folder import MERGED, code_files, model_files
from ..monitor.margins import MARGINS_FILE, SAMPLES_FILE
from ..text import is_place, unplaced
from .files import UPLOAD

if TYPE_CHECKING:
    from transformers import Trainer


def push(trainer: Trainer) -> None:
    """Upload ``output_dir``, card and report and all, as ``push_to_hub`` asks; on every rank.

    Raises:
        UserError: the hub cannot be reached or refuses; all files are there still.
    """
    folder = trainer.args.output_dir
    again = f"hf upload {trainer.hub_model_id or 'OWNER/NAME'} {folder} --exclude 'checkpoint-*'"
    with hub_refusals(f"push_to_hub: {folder} is complete but was not pushed; {again}"):
        trainer.push_to_hub()


SHARED = ("README.md", "report.html", SAMPLES_FILE, MARGINS_FILE)
RECORDS = ("run.json", "trainer_state.json", "adapter_config.json")
"""Files in which paths of this machine are cut to their last component."""


def push_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """Begin to upload a checkpoint's model, and in a folder of its own if ``hub_strategy`` asks.

    Without the states of optimizer and random generators, which are pickles: a run goes on from
    the checkpoint itself.
    """
    args: Any = trainer.args
    running: Any = trainer.push_in_progress
    busy = running is not None and not running.is_done()
    if args.hub_strategy == HubStrategy.END or (busy and not args.hub_always_push):
        return
    step = trainer.state.global_step
    message = f"Training in progress, step {step}"
    jobs: Any = [upload(trainer, message, checkpoint, blocking=False)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        last = args.hub_strategy == HubStrategy.CHECKPOINT
        place = "last-checkpoint" if last else checkpoint.name
        options = {"source": checkpoint, "path_in_repo": place, "blocking": False}
        jobs.append(upload(trainer, f"{message}, checkpoint", **options))
    if busy and running is not None:
        running.jobs.extend(jobs)
    else:
        trainer.push_in_progress = PushInProgress(jobs)


def upload(
    trainer: Trainer,
    message: str,
    model: Path | None = None,
    *,
    source: Path | None = None,
    blocking: bool = True,
    **other: Any,
) -> Any:
    """Upload what is to be shared of ``output_dir``, or of ``source``; see `staged_upload`."""
    args: Any = trainer.args
    folder = Path(str(args.output_dir))
    staging = folder / f"{UPLOAD}{uuid.uuid4().hex}"

    def done(*_: Any) -> None:
        shutil.rmtree(staging, ignore_errors=True)

    options = {"token": args.hub_token, "revision": args.hub_revision} | other
    job = None
    try:
        staged_upload(staging, source or folder, model)
        job = _client().upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=str(staging),
            commit_message=message,
            run_as_future=not blocking,
            **options,
        )
    finally:
        if isinstance(job, Future):
            job.add_done_callback(done)
        else:
            done()
    return job


def staged_upload(staging: Path, folder: Path, model: Path | None = None) -> None:
    """Fill a folder to upload in place of ``folder``, with the files of ``model`` if given."""
    holders = [model] if model else [folder, folder / MERGED]
    files = [path for each in holders for path in (*model_files(each), *code_files(each))]
    sources = [(path, model or folder) for path in files]
    sources += [(folder / name, folder) for name in (*SHARED, *RECORDS)]
    for path, root in sources:
        target = staging / path.relative_to(root)
        if not path.is_file() or target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name in RECORDS:
            target.write_text(_without_places(path), encoding="utf-8")
        elif path.suffix == ".safetensors":
            _link(path, target)
        else:
            shutil.copyfile(path, target)


def _without_places(path: Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    base = content.get("base_model_name_or_path")
    if base and is_place(base):
        content["base_model_name_or_path"] = None  # cut, it would name another's model there
    return json.dumps(unplaced(content), indent=2) + "\n"


def _link(path: Path, target: Path) -> None:
    """A second name, which outlives the checkpoint's own; a copy where there can be none."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def _client() -> Any:
    """As transformers makes it."""
    return getattr(transformers.trainer, "hf_api", HfApi)()


@contextmanager
def hub_refusals(what: str) -> Iterator[None]:
    """What goes wrong with the hub inside becomes a ``UserError`` that begins with ``what``."""
    from huggingface_hub.errors import HfHubHTTPError

    # A connection refused is of the client library's own kind, which differs by the hub's version.
    kinds: Any = HfHubHTTPError.__bases__
    with refusals(what, OSError, ValueError, RuntimeError, *kinds):
        yield
