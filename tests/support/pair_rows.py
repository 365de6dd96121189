"""Small preference data, and files of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from tests.support.tiny_tokenizers import tiny_tokenizer

Row = dict[str, Any]


def make_rows(n: int, start: int = 0) -> list[Row]:
    """Pairs whose rejected side says which they are."""
    return [{"prompt": "a", "chosen": " yes", "rejected": f" {start + i}"} for i in range(n)]


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def bot(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def names(dataset: Dataset | None) -> list[int]:
    assert dataset is not None
    return [int(str(tiny_tokenizer().decode(ids[:-1]))) for ids in dataset["rejected_ids"]]


def write(path: Path, rows: list[Row]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(text)
    return str(path)
