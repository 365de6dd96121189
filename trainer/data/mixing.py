"""Which rows of which sources a run trains and evaluates on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..settings.data import DEFAULT_SPLITS, DataSettings, is_training_split
from .columns import RAW_COLUMNS, TOKEN_COLUMNS, is_tokenized
from .sources import WHOLE, open_source

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Part:
    """The first ``len(rows)`` of the ``available`` rows of one split of one source."""

    name: str
    split: str
    rows: Dataset
    available: int

    def row_name(self, row: int) -> str:
        split = f" [{self.split}]" if self.split else ""
        return f"row {row} of {self.name}{split}"


def gather(settings: DataSettings, notes: list[str]) -> tuple[list[Part], list[Part]]:
    """The parts to train on and the parts to evaluate on; what is missing goes to ``notes``."""
    training: list[Part] = []
    evaluation: list[Part] = []
    train_splits = [split for split in settings.dataset_splits if is_training_split(split)]
    eval_splits = [split for split in settings.dataset_splits if not is_training_split(split)]
    for name, fraction in settings.mixture().items():
        tables = open_source(name, settings.dataset_splits)
        training += _parts(tables, name, train_splits, fraction)
        if settings.eval_dataset:
            continue
        if WHOLE in tables:
            notes += [f"{name} is one table, all for training"] if eval_splits else []
            continue
        present = [split for split in eval_splits if split in tables]
        if present != eval_splits and settings.dataset_splits == DEFAULT_SPLITS:
            notes.append(f"{name} has no split to evaluate on ({_found(tables)})")
            continue
        evaluation += _parts(tables, name, eval_splits, 1.0)
    if settings.eval_dataset:
        splits = eval_splits or [DEFAULT_SPLITS[1]]
        tables = open_source(settings.eval_dataset, splits)
        evaluation += _parts(tables, settings.eval_dataset, splits, 1.0)
    return training, evaluation


def _parts(tables: dict[str, Dataset], name: str, splits: list[str], fraction: float) -> list[Part]:
    parts = []
    for split in splits[:1] if WHOLE in tables else splits:
        table = tables.get(WHOLE, tables.get(split))
        if table is None:
            raise UserError(
                f"data set {name!r} has no split {split!r} ({_found(tables)}); "
                "set dataset_splits: to those to use"
            )
        rows = checked_columns(name, table)
        head = rows.select(range(int(fraction * len(rows))))
        parts.append(Part(name, WHOLE if WHOLE in tables else split, head, len(rows)))
    return parts


def _found(tables: dict[str, Dataset]) -> str:
    return f"found: {', '.join(tables) or 'none'}"


ADVICE = {
    "DatasetDict": "give one of its splits, such as data['train']",
    "IterableDataset": "lengths are planned before training: make one with "
    "Dataset.from_list(list(rows))",
    "DataFrame": "make one with Dataset.from_pandas(rows)",
    "str": "load_dataset makes one, and PreferenceConfig(dataset=...) with `widemargin train`",
    "dict": "make one with Dataset.from_dict(columns)",
}
"""How to get a data set from other things that hold one."""


def checked_columns(name: str, dataset: Any) -> Dataset:
    """``dataset`` with only the columns that matter; an error where they are missing."""
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not hasattr(dataset, "select"):
        kind = type(dataset).__name__
        advice = ADVICE.get(kind, "make one with Dataset.from_list(rows)")
        raise UserError(f"{name}: expected a datasets.Dataset, got {kind}; {advice}")
    if is_tokenized(dataset):
        return dataset.select_columns(list(TOKEN_COLUMNS))
    if not {"chosen", "rejected"} <= set(columns):
        raise UserError(
            f"data set {name!r} has the columns {', '.join(columns) or '(none)'}; expected prompt, "
            "chosen and rejected (or chosen and rejected that share their beginning); rename its "
            "columns"
        )
    return dataset.select_columns([column for column in RAW_COLUMNS if column in columns])
