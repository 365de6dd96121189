"""Raw rows -> the table of tokens, from disk where it is there.

Rows are tokenized once: `cached_map` keeps the result on disk under a hash of everything the tokens
depend on. The hash covers the raw rows (the data set's own fingerprint), the tokenizer's content
and template, the rendering and the limits; never the identity of an object, nor the truncation and
padding that a tokenizer remembers from its last call. So the next run finds the result, and so do
the other processes of this one: they wait for the first on a lock file, not in a collective that
times out. A file that is damaged or cut off is tokenized again.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import is_sealed, seal
from ..settings.data import EDGES, DataSettings
from .chat import Rendering, only_id
from .encoding import PairTokenizer, TokenizedReader
from .formats.answers import Edges
from .limits import Limits
from .table import UNSCORED_COLUMNS, features, is_tokenized
from .template import generation_stops

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .images.processor import ImageProcessor


# Raise it when the same rows, tokenizer and settings come to give other tokens or counts.
_VERSION = 10

IMAGES_AT_ONCE = 32
"""Rows with images that are in memory at a time."""


def cached_map(
    raw: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    images: ImageProcessor | None = None,
    folder: str | None = None,
) -> Dataset:
    """The rows of ``raw`` tokenized (or, if they hold ids already, checked and cut).

    With the processor of ``images`` rows may have some, and the result has their columns.
    ``folder`` keeps them, in place of the data sets' cache.
    """
    from datasets import config
    from filelock import FileLock

    limits, rendering = Limits.of(settings), Rendering.of(settings)
    if is_tokenized(raw) and rendering.score != "completion":
        raise UserError(
            f"score: {rendering.score} needs the conversations, and the data set holds token ids; "
            f"give it the columns {', '.join(UNSCORED_COLUMNS)}, or set score: completion"
        )
    stops = generation_stops(tokenizer, settings)
    edges = Edges(settings.edges or EDGES[0], settings.edge_gap)
    key = fingerprint(raw, tokenizer, limits, rendering, stops, edges, images)
    folder = folder or os.path.join(config.HF_DATASETS_CACHE, "widemargin")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"pairs-{key}.arrow")
    with FileLock(path + ".lock"), unchanged(Path(folder), key), children_end_with_this():
        return raw.map(
            TokenizedReader(limits, only_id(tokenizer.bos_token_id), images is not None)
            if is_tokenized(raw)
            else PairTokenizer(tokenizer, limits, rendering, stops, edges, images),
            batched=True,
            with_indices=True,
            remove_columns=raw.column_names,
            features=features(images is not None),
            batch_size=1000 if images is None else IMAGES_AT_ONCE,
            writer_batch_size=None if images is None else IMAGES_AT_ONCE,
            num_proc=settings.preprocessing_num_workers,
            new_fingerprint=key,
            cache_file_name=path,
            desc="Tokenizing pairs",
        )


def fingerprint(
    raw: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    rendering: Rendering | None = None,
    stops: frozenset[int] = frozenset(),
    edges: Edges | None = None,
    images: ImageProcessor | None = None,
) -> str:
    """The hash of all that decides the tokens of ``raw``."""
    import tokenizers
    import transformers
    from datasets.fingerprint import Hasher

    versions = [_VERSION, transformers.__version__, tokenizers.__version__]
    settings = [asdict(limits), asdict(rendering or Rendering()), sorted(stops)]
    settings.append(asdict(edges or Edges()))
    settings += [] if images is None else [images.content]
    facts = [versions, raw._fingerprint, _tokenizer_content(tokenizer), settings]
    return Hasher.hash(json.dumps(facts, sort_keys=True, default=str))


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    content: Any
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"vocabulary": tokenizer.get_vocab(), "init": tokenizer.init_kwargs}
    else:
        backend.no_truncation()  # left from its last call; the next call sets it again
        backend.no_padding()
        content = backend.to_str()
    return {
        "class": type(tokenizer).__name__,
        "content": content,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "split_special": getattr(tokenizer, "split_special_tokens", None),
    }


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


@contextmanager
def children_end_with_this() -> Iterator[None]:
    """Processes forked inside, and theirs, end within a second when their parent has been killed.

    Workers that tokenize, and the process that holds their queue, would otherwise wait for ever,
    and hold the lock.
    """
    global _parent
    _parent = os.getpid()
    try:
        yield
    finally:
        _parent = None


_parent: int | None = None
"""The process inside `children_end_with_this`; None outside."""


def _watch_parent() -> None:
    """Run in every forked process."""
    global _parent
    if _parent is not None:
        threading.Thread(target=_end_after, args=[_parent], daemon=True).start()
        _parent = os.getpid()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


os.register_at_fork(after_in_child=_watch_parent)
