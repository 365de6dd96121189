"""Data sets that are streams: of training a shard at a time, of evaluation to their end.

Steps are planned by the lengths of their pairs, which a stream tells as it is read. So a run reads
its next ``stream_shard_size`` pairs that can train, plans them as an epoch of a data set, and reads
the next ones when they have trained. Where the stream ends it begins again. One that ends within
the first shard is a data set like any other.

What a shard holds follows from the rows before it, so a resumed run reads on where its shard began,
which the checkpoint says, and has the pairs and steps of a run that was never stopped.
"""

from __future__ import annotations

import atexit
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from datasets import Dataset, Features, IterableDataset

from ..data.images.columns import undecoded
from ..data.table import PairRows
from ..data.table.columns import numbers_digest, tokens_digest
from ..errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from ..settings.config import PreferenceConfig

Prepare = Callable[[list[Dataset], str], Dataset]
"""Parts of a shard, and a folder for their tokens -> their pairs, tokenized."""


def read_stream(stream: IterableDataset, most: int | None) -> Dataset:
    """The rows of ``stream``, at most ``most``, as a data set.

    They lie in a temporary folder until the process ends, and only parts of them in memory.
    """
    folder = _temporary_folder()
    stored = as_stored(stream if most is None else stream.take(most))

    def rows() -> Iterator[dict[str, Any]]:
        yield from stored

    try:
        read: Any = Dataset.from_generator(rows, stored.features, cache_dir=folder)
    except Exception as error:
        raise _unreadable(error.__cause__ or error) from error
    return read


def as_stored(stream: IterableDataset) -> IterableDataset:
    """``stream`` without its images and sounds decoded, which would open the files they name."""
    if not stream.features:
        return stream
    # The first also undoes decoding in threads, but leaves rows of mixed types as JSON text.
    return stream.decode(False).cast(Features(undecoded(stream.features)))


class Shards:
    """Reads a stream as data sets of ``size`` pairs.

    Args:
        stream: whose rows come in the same order whenever it is read.
        size: pairs of every shard.
        prepare: makes pairs of rows.

    Attributes:
        places: of shards that are known: how often the stream had been read to its end before the
            shard, and how many rows of it after that.
        digests: what shards that have trained hold, as hashes.
        ended: whether the stream ended within the first shard, which is then all of it.
    """

    def __init__(self, stream: IterableDataset, size: int, prepare: Prepare) -> None:
        self.stream = as_stored(stream.with_format(None))
        self.size, self.prepare = size, prepare
        self.places: dict[int, tuple[int, int]] = {0: (0, 0)}
        self.digests: dict[int, str] = {}
        self.ended = False
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._at: tuple[int, int] | None = None
        self._folder: str | None = None

    def read(self, shard: int) -> Dataset:
        """The pairs of a shard; those of the one read before may be gone from the disk."""
        while shard not in self.places:
            self.read(max(self.places))
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = _temporary_folder()
        place, parts, pairs = self.places[shard], [], Dataset.from_dict({})
        while len(pairs) < self.size and not self.ended:
            place, rows = self._next(place, self.size - len(pairs), first=shard == 0)
            parts += [rows] if len(rows) else []
            if not parts:
                raise UserError("train_dataset: give an IterableDataset with rows; it has none")
            pairs = self.prepare(parts, self._folder)
        if len(pairs) > self.size and not self.ended:
            raise UserError(
                "stream_shard_size: set it to more rows than the stream has, or make pairs of its "
                f"rows first; {len(parts[0]):,} rows gave {len(pairs):,} pairs, and a shard ends "
                "with a row"
            )
        self.places[shard + 1] = place
        return pairs

    def _next(
        self, place: tuple[int, int], count: int, *, first: bool
    ) -> tuple[tuple[int, int], Dataset]:
        """The rows from a place on, and the place after them.

        Fewer than ``count`` where the stream ends in the ``first`` shard, before it begins again.
        """
        rows: list[dict[str, Any]] = []
        while True:
            rows += (read := self._read(place, count - len(rows)))
            place = place[0], place[1] + len(read)
            self.ended = first and place[0] == 0 and len(rows) < count
            if self.ended or len(rows) == count:
                break
            if not place[1]:
                raise UserError(
                    "train_dataset: give a stream that can be read again, or fewer max_steps; it "
                    "gave rows once and none when they were asked for a second time"
                )
            place = place[0] + 1, 0
        columns = dict.fromkeys(name for row in rows for name in row)
        try:
            table = {name: [row.get(name) for row in rows] for name in columns}
            return place, Dataset.from_dict(table, self.stream.features if rows else None)
        except Exception as error:
            raise _unreadable(error) from error

    def _read(self, place: tuple[int, int], most: int) -> list[dict[str, Any]]:
        """Up to so many rows from a place on; fewer where the stream ends."""
        try:
            if place != self._at:
                rest = self.stream.skip(place[1])
                rest.set_epoch(place[0])  # a stream that shuffles does so otherwise in every pass
                self._rows = iter(rest)
            rows = list(itertools.islice(self._rows, most))
        except Exception as error:
            raise _unreadable(error) from error
        self._at = place[0], place[1] + len(rows)
        return rows


class StreamedRows(PairRows):
    """Rows of a stream: of one shard, until it becomes another.

    Attributes:
        shard: number of the shard, from 0 on.
    """

    def __init__(self, shards: Shards, rows_of: Callable[[Dataset], PairRows]) -> None:
        self.shards, self.rows_of, self.shard = shards, rows_of, -1
        self.go_to(0)

    def go_to(self, shard: int) -> None:
        """Become the rows of another shard."""
        if shard != self.shard:
            rows = self.rows_of(self.shards.read(shard))
            own = {"shards": self.shards, "rows_of": self.rows_of, "shard": shard}
            self.__dict__ = vars(rows) | own

    @property
    def within(self) -> str:
        return f" in shard {self.shard}"

    @property
    def longest_to_come(self) -> int:
        return self.max_length or 0

    def __getstate__(self) -> dict[str, Any]:
        """For workers, which read this shard's rows and no others."""
        return {k: v for k, v in vars(self).items() if k not in ("shards", "rows_of")}


def rows_of_stream(
    stream: IterableDataset,
    settings: PreferenceConfig,
    prepare: Prepare,
    rows_of: Callable[[Dataset], PairRows],
) -> PairRows:
    """The rows of training of a stream, and the settings that fit them.

    Raises:
        UserError: a setting that needs all pairs at the start, and there are more than a shard's.
    """
    if settings.max_train_samples is not None:
        stream = stream.take(settings.max_train_samples)
    steps = math.ceil(settings.stream_shard_size / settings.pairs_per_step)
    rows = StreamedRows(Shards(stream, steps * settings.pairs_per_step, prepare), rows_of)
    if rows.shards.ended:
        return rows_of(rows.source)
    for name, remedy in _of_all_pairs(settings).items():
        raise UserError(
            f"{name}: {remedy}; the stream goes on after the {len(rows):,} pairs of its first "
            "shard (stream_shard_size). Or set max_train_samples, to take so many rows of it as a "
            "data set"
        )
    settings.dataloader_persistent_workers = False  # they would keep the first shard
    return rows


def _of_all_pairs(settings: PreferenceConfig) -> dict[str, str]:
    """Settings that cannot be as they are where pairs are yet to come, and what to do."""
    remedies = {
        "max_steps": ("set it", settings.max_steps < 1),
        "max_length": ("set it", settings.max_length is None),
        "precompute_ref_log_probs": ("set it to false", settings.precompute_ref_log_probs),
        "max_tokens_per_micro_batch": (
            "leave it out",
            settings.max_tokens_per_micro_batch is not None,
        ),
    }
    return {name: remedy for name, (remedy, wrong) in remedies.items() if wrong}


def place_in_stream(rows: Any) -> dict[str, Any]:
    """What a checkpoint keeps of where a stream is; empty for other data."""
    if not isinstance(rows, StreamedRows):
        return {}
    shards, shard = rows.shards, rows.shard
    places = [[n, *shards.places[n]] for n in (shard, shard + 1)]
    return {"stream": {"places": places, "digest": [shard, shards.digests[shard]]}}


def go_on_in_stream(rows: Any, progress: dict[str, Any]) -> None:
    """Have the shards where a checkpoint's ``progress`` says that they begin."""
    if isinstance(rows, StreamedRows) and "stream" in progress:
        saved = progress["stream"]
        rows.shards.places |= {n: (passes, row) for n, passes, row in saved["places"]}
        rows.shards.digests |= dict([saved["digest"]])


def check_same_shard(args: TrainingArguments, rows: Any) -> None:
    """Raise ``UserError`` where a shard differs between ranks, or from what it was before.

    A collective with several ranks, for streams.
    """
    if not isinstance(rows, StreamedRows):
        return
    mine = f"{tokens_digest(rows)} {numbers_digest(rows)}"
    everyone = [mine] * args.world_size
    if args.world_size > 1:
        dist.all_gather_object(everyone, mine)
    before = rows.shards.digests.setdefault(rows.shard, mine)
    if len({*everyone, before}) > 1:
        where = "on another rank" if len({*everyone}) > 1 else "when it was read before"
        raise UserError(
            "train_dataset: give a stream whose rows come in the same order whenever it is read "
            f"(shuffle it with a seed); shard {rows.shard} of it had other rows {where}"
        )


def _temporary_folder() -> str:
    folder = tempfile.mkdtemp(prefix="widemargin-stream-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unreadable(error: BaseException) -> UserError:
    return UserError(
        "train_dataset or eval_dataset: a row of the IterableDataset cannot be read: "
        f"{error}; mend it, or give a datasets.Dataset"
    )
