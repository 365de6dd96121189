"""The cached files of tokens: as they were written, and by workers that end with their run."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...files import is_sealed, seal

logger = logging.getLogger(__name__)


@contextmanager
def unchanged(folder: Path, key: str) -> Iterator[None]:
    """Remove cached files that are not as they were written, and note what is written inside."""
    seal_file = folder / f"pairs-{key}.sealed"
    before = list(folder.glob(f"pairs-{key}*.arrow"))  # one for each process
    if before and not is_sealed(seal_file, before):
        logger.warning("%s: it is incomplete or damaged; tokenizing again", before[0])
        for path in (*before, seal_file):
            path.unlink(missing_ok=True)
        before = []
    yield
    after = list(folder.glob(f"pairs-{key}*.arrow"))
    if set(after) != set(before):
        seal(seal_file, after)


class DyingWithParent:
    """Reads batches; where a worker process does, it ends when its parent has been killed.

    Otherwise it would wait for work for ever, and hold the lock.
    """

    def __init__(self, read: Any) -> None:
        self.read, self.parent, self.watched = read, os.getpid(), False

    def __call__(self, batch: Any, indices: list[int]) -> Any:
        if os.getpid() != self.parent and not self.watched:
            self.watched = True
            threading.Thread(target=self._watch, daemon=True).start()
        return self.read(batch, indices)

    def _watch(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(1)
        os._exit(1)
