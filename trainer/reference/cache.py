"""A reference's log-probs computed once and kept on disk, by content.

A file belongs to one model and one data set: its name is a hash of the model's weights and config,
of the token ids of every pair in their order, and of the precision and attention that computed it.
So it cannot be stale, and another tokenizer, template or limit is another file. Layout and batch
sizes, which move the last bits only, are left out. It is a safetensors file of two columns, with
its key and a checksum; one that does not match is computed again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from ..batching.workers import sheltered
from ..data.table import REFERENCE_COLUMNS as COLUMNS
from ..data.table import PairRows
from ..data.table.columns import tokens_digest
from ..errors import UserError
from ..files import digest, replacing
from ..model.adapters import bare_model
from ..objectives.terms import by_edges
from ..settings.checks import is_split

if TYPE_CHECKING:
    from transformers import Trainer

    from ..settings.config import PreferenceConfig

# Raise it when the same model and tokens come to give other log-probs, or the file's form changes.
_VERSION = 1

logger = logging.getLogger(__name__)

Values = dict[str, np.ndarray]


def precomputed(
    rows: PairRows, model: str, score: Callable[[Any], Tensor], trainer: Trainer, weights: str = ""
) -> tuple[Values, str]:
    """The columns of `COLUMNS` for ``rows``, from disk or computed, and a line that says which.

    Call it on all ranks, each of which gets the same values. The main one alone reads and writes,
    so it does not matter whether the ranks share a disk.

    Args:
        model: the digest of the model's content; only the main process's counts.
        score: a collated batch -> sums [S].
        weights: how ``score`` weighs tokens, "" for all alike.
    """
    main = trainer.args.process_index == 0
    key = cache_key(model, rows, trainer, weights)
    path = Path(cache_folder()) / f"reference-{key}.safetensors"
    cached = [read(path, len(rows)) if main else None]
    if trainer.args.world_size > 1:
        broadcast_object_list(cached)
    if cached[0] is not None:
        return cached[0], f"reference log-probs: read for {len(rows):,} pairs from {path}"
    values = _computed(rows, score, trainer)
    unusable = int(sum((~np.isfinite(column)).sum() for column in values.values()))
    if unusable:
        raise UserError(
            f"reference: {unusable} of its {2 * len(rows)} log-probs are not finite; look for "
            "broken weights, or compute in another precision (bf16 in place of fp16)"
        )
    if main:
        write(path, values)
    return values, f"reference log-probs: computed for {len(rows):,} pairs, kept in {path}"


def _computed(rows: PairRows, score: Callable[[Any], Tensor], trainer: Trainer) -> Values:
    """Every rank's share of each batch, gathered batch by batch: no rank waits for long."""
    args: PreferenceConfig = trainer.args  # pyright: ignore[reportAssignmentType]
    shares = [
        share.repeat(args.sequence_parallel_size, axis=0)
        for share in _shares(rows, args.eval_batch_size, args.data_parallel_size)
    ]
    loader: Any = sheltered(
        DataLoader(
            rows,
            batch_sampler=[share[args.process_index].tolist() for share in shares],  # pyright: ignore
            collate_fn=trainer.data_collator,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # the global one is the training's
        )
    )
    if args.process_index == 0 and not args.disable_tqdm:
        from tqdm.auto import tqdm

        loader = tqdm(loader, desc="Reference log-probs")
    gathered = []
    for batch in loader:
        sums = score(batch)
        sums = by_edges(sums, batch["edges"].to(sums.device))
        gathered.append(trainer.accelerator.gather(sums.view(2, -1).T.contiguous()))
    sums = torch.cat(gathered).cpu().numpy()  # pairs by batch, then by rank, chosen and rejected
    values = np.empty((len(rows), 2), sums.dtype)
    values[np.concatenate([share.ravel() for share in shares])] = sums
    return {name: values[:, i].copy() for i, name in enumerate(COLUMNS)}


def _shares(rows: PairRows, size: int, ranks: int) -> Iterator[np.ndarray]:
    """[ranks, size] row numbers of a batch on each rank, the longest trees first.

    Trees stay together as far as a rank's batch has room; the last batch repeats rows to be full.
    """
    lengths, every = rows.lengths, np.arange(len(rows))
    tokens = lengths.computed("prefix_shared", every, lengths.tree, len(every))
    order = np.lexsort((lengths.tree, -tokens[lengths.tree]))
    for start in range(0, len(order), size * ranks):
        batch = np.resize(order[start : start + size * ranks], size * ranks)
        yield batch.reshape(-1, ranks).T if rows.trees is None else batch.reshape(ranks, -1)


def cache_folder() -> str:
    """Beside the tokenized data: in ``datasets``' cache."""
    from datasets import config

    return os.path.join(config.HF_DATASETS_CACHE, "widemargin")


def cache_key(model: str, rows: PairRows, trainer: Trainer, weights: str = "") -> str:
    """The hash of all that decides the log-probs of ``rows``."""
    accelerator, args = trainer.accelerator, trainer.args
    policy: Any = trainer.model
    facts = [
        _VERSION,
        model,
        tokens_digest(rows),
        accelerator.mixed_precision,
        str(accelerator.distributed_type) if is_split(args) else "",
        bool(args.tf32),
        bare_model(policy).config.get_text_config()._attn_implementation,
    ]
    if weights:
        facts.append(weights)
    return digest([json.dumps(facts)])


def write(path: Path, values: Values) -> None:
    """Write the columns with their key and checksum, completely or not at all."""
    notes = {"key": path.stem, "rows": str(len(values[COLUMNS[0]])), "checksum": _checksum(values)}
    with replacing(path) as temporary:
        save_file(values, temporary, metadata=notes)


def read(path: Path, rows: int) -> Values | None:
    """What `write` wrote; None for no file, and for one that is cut off or of something else."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            notes = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in COLUMNS}
    except (SafetensorError, OSError) as error:
        values, problem = None, str(error)
    else:
        problem = _problem(values, notes, path.stem, rows)
    if problem:
        logger.warning("%s: %s; computing the reference's log-probs again", path, problem)
        return None
    return values


def _problem(values: Values, notes: Mapping[str, str], key: str, rows: int) -> str:
    if notes.get("key") != key:
        return "it is another file under this name"
    if notes.get("rows") != str(rows) or any(len(column) != rows for column in values.values()):
        return f"it does not have {rows} rows"
    return "" if notes.get("checksum") == _checksum(values) else "its checksum does not match"


def _checksum(values: Values) -> str:
    return digest(
        f"{name} {values[name].dtype} ".encode() + values[name].tobytes() for name in COLUMNS
    )
