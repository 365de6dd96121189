"""Pairs for `bench.training`: real ones as token ids, a long-prompt version, or lengths alone."""

import dataclasses
import gzip
import json
import random
from pathlib import Path
from typing import Any

Message = dict[str, str]
Rows = list[dict[str, list[int]]]
SIDES = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclasses.dataclass(frozen=True)
class PairSource:
    """Which pairs a benchmark trains on."""

    pairs: Path  # JSONL of messages, perhaps gzipped
    tokenizer: Path
    count: int
    max_length: int
    long_prompts: bool
    seed: int = 0
    by_prompt: bool = False  # all pairs of a prompt, one prompt after another


def read_pairs(path: Path) -> list[dict[str, list[Message]]]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


def with_earlier_exchange(
    rows: list[dict[str, list[Message]]], generator: random.Random
) -> list[dict[str, list[Message]]]:
    """Each pair with another pair's question and chosen answer before its prompt."""
    earlier = [generator.choice(rows) for _ in rows]
    return [
        row | {"prompt": other["prompt"] + other["chosen"] + row["prompt"]}
        for row, other in zip(rows, earlier, strict=True)
    ]


def token_rows(source: PairSource) -> Rows:
    """A seeded sample of the pairs, tokenized and cut as training does."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from widemargin.trainer.data import DataSettings, tokenize_pairs

    generator = random.Random(source.seed)
    raw = read_pairs(source.pairs)
    generator.shuffle(raw)
    if source.by_prompt:
        places: dict[str, int] = {}
        raw.sort(key=lambda row: places.setdefault(json.dumps(row["prompt"]), len(places)))
    raw = raw[: source.count * 2]  # some do not survive the limits
    if source.long_prompts:
        raw = with_earlier_exchange(raw, generator)
    settings = DataSettings(
        max_length=source.max_length, max_prompt_length=source.max_length * 3 // 4
    )
    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer)
    tokenized, _ = tokenize_pairs(Dataset.from_list(raw), tokenizer, settings)
    kept: Any = tokenized.select(range(min(source.count, len(tokenized))))
    return [{side: list(row[side]) for side in SIDES} for row in kept]


def rows_of_lengths(lengths: list[list[int]], vocabulary: int, seed: int = 0) -> Rows:
    """Random token ids of given ``[prompt, chosen, rejected]`` lengths."""
    generator = random.Random(seed)

    def ids(count: int) -> list[int]:
        return generator.choices(range(10, vocabulary), k=count)

    return [dict(zip(SIDES, map(ids, three), strict=True)) for three in lengths]


def folded(rows: Rows, vocabulary: int) -> Rows:
    """The same lengths, with token ids of a smaller vocabulary."""
    return [{side: [i % vocabulary for i in ids] for side, ids in row.items()} for row in rows]


def lengths_of(rows: Rows) -> list[list[int]]:
    return [[len(row[side]) for side in SIDES] for row in rows]
