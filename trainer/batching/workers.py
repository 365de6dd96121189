"""Processes that collate batches, kept alive until a run has saved its checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from functools import partial
from typing import Any


def sheltered(loader: Any) -> Any:
    """The data loader, whose workers outlive a SIGTERM that is sent to all processes of a run.

    Schedulers send it so, and a worker's death would end training before its checkpoint.
    """
    base = getattr(loader, "base_dataloader", loader)  # accelerate's keep torch's own inside
    start = base.worker_init_fn
    if base.num_workers and not (isinstance(start, partial) and start.func is _start_worker):
        base.worker_init_fn = partial(_start_worker, start)
    return loader


def _start_worker(start: Any, worker: int) -> None:
    """Heed SIGTERM from the parent alone, which so ends the workers that it no longer needs."""
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()
    if start is not None:
        start(worker)


def _end_with(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
