"""The model and pairs that whole steps are measured on, where the user names none.

Beside a checkout of the project's own there is a small trained model with real pairs. Where that
is absent, as in any other clone, the quickstart's model (random weights) and its generated pairs
take their place, and rows say so by their case.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.record import ROOT

SHARED = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Subject:
    model: Path  # folder
    pairs: Path  # JSONL of messages, perhaps gzipped

    @property
    def case(self) -> str:
        return self.model.name


def find_subject(folder: Path) -> Subject:
    """The shared model, or the quickstart's, which is written to ``folder``."""
    model, pairs = SHARED / "small_lm", SHARED / "judged_pairs_train.jsonl.gz"
    return Subject(model, pairs) if model.is_dir() and pairs.is_file() else quickstart(folder)


def quickstart(folder: Path) -> Subject:
    """The quickstart's model and pairs, made from a seed."""
    from widemargin.trainer.quickstart_data import make_pairs, write_dataset
    from widemargin.trainer.quickstart_model import write_model

    train, test = make_pairs(0)
    model, data = folder / "quickstart-model", folder / "quickstart-data"
    write_dataset(data, train, test)
    write_model(model, [*train, *test], 0)
    return Subject(model, data / "train.jsonl")
