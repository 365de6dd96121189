"""Data sets that are streams: read whole onto the disk, since steps are planned by lengths."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from ..errors import UserError


def read_stream(stream: IterableDataset, most: int | None) -> Dataset:
    """The rows of ``stream``, at most ``most``, as a data set that can be planned and resumed.

    They lie in a temporary folder until the process ends, and only parts of them in memory.
    """
    folder = tempfile.mkdtemp(prefix="widemargin-stream-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def rows() -> Iterator[dict[str, Any]]:
        yield from stream if most is None else stream.take(most)

    try:
        read: Any = Dataset.from_generator(rows, cache_dir=folder)
    except Exception as error:
        raise UserError(
            "train_dataset or eval_dataset: a row of the IterableDataset cannot be read: "
            f"{error.__cause__ or error}; mend it, or give a datasets.Dataset"
        ) from error
    return read
