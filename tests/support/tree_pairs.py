"""Pairs of which several share a prompt."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from tests.support.tiny_models import VOCABULARY

WORDS = ("yes", "no", "maybe", "water", "Paris", "never", "always")


def token_trees(answers: tuple[int, ...] = (7, 2, 4), seed: int = 0) -> list[dict[str, Any]]:
    """Rows of token ids with their trees: the best answer against every other, tree after tree."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int) -> list[int]:
        length = int(torch.randint(least, 20, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for tree, count in enumerate(answers):
        prompt, leaves = tokens(2), [tokens(1) for _ in range(count)]
        rows += [
            {
                "prompt_ids": prompt, "chosen_ids": leaves[0], "rejected_ids": leaves[i],
                "tree_id": tree, "leaf_ids": [10 * tree, 10 * tree + i],
            }
            for i in range(1, count)
        ]  # fmt: skip
    return rows


def text_trees(prompts: int = 4, answers: int = 4) -> Dataset:
    """Pairs as text: of every prompt the first answer against each other one."""
    rows = [
        {
            "prompt": f"User: {' '.join(WORDS[: i + 1])} Assistant:",
            "chosen": f" {WORDS[i]} {WORDS[0]}.",
            "rejected": f" {' '.join(WORDS[j : j + 3])}",
        }
        for j in range(1, answers)
        for i in range(prompts)
    ]
    return Dataset.from_list(rows)


def text_lists(prompts: int = 6, most: int = 5) -> Dataset:
    """Rows of two to ``most`` answers with scores, of which some are equal."""
    rows = []
    for i in range(prompts):
        count = 2 + i % (most - 1)
        answers = [f" {' '.join(WORDS[j : j + 2 + i % 3])} {WORDS[i % 7]}" for j in range(count)]
        scores = [2.0, *(0.5 * (j // 2) for j in range(count - 1))]
        prompt = f"User: {WORDS[i % 7]} {' '.join(WORDS[: i + 1])} Assistant:"
        rows.append({"prompt": prompt, "completions": answers, "scores": scores})
    return Dataset.from_list(rows)


def apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, each a tree of its own."""
    return [{k: v for k, v in row.items() if k not in ("tree_id", "leaf_ids")} for row in rows]
