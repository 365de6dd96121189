"""Prompts, command lines and records of `widemargin generate`, `score` and `pair`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from widemargin.trainer.evaluation.results import Records
from widemargin.trainer.files import digest

from tests.support.eval_files import WORDS

FOUR = 4


def prompts_file(
    folder: Path, rows: list[dict[str, Any]] | None = None, name: str = "prompts.jsonl"
) -> str:
    """Four prompts, unless ``rows`` are given."""
    folder.mkdir(parents=True, exist_ok=True)
    if rows is None:
        rows = [{"prompt": word, "gold": i} for i, word in enumerate(WORDS[:FOUR])]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def generate(model: str, source: str, out: Path, *more: str) -> list[str]:
    """The command line of a short run of two answers a prompt, where ``more`` does not differ."""
    defaults = {"--n": "2", "--temperature": "1.5", "--max_new_tokens": "6", "--device": "cpu"}
    given = {argument.partition("=")[0] for argument in more}
    short = [f"{key}={value}" for key, value in defaults.items() if key not in given]
    return ["generate", source, "--model", model, "--out", str(out), *short, *more]


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def save_answers(
    folder: Path,
    answers: dict[str, list[dict[str, Any]]],
    scores: dict[str, list[float | None]] | None = None,
    **settings: Any,
) -> Path:
    """A folder as `generate` and `score --name s` leave it: a prompt's text -> its answers."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, made, scored = [], [], []
    for number, (text, several) in enumerate(answers.items()):
        talk = [{"role": "user", "content": text}]
        fixed = {"prompt": talk, "arguments": {}, "token_ids": [1, number], "row": {"gold": number}}
        asked.append({"id": f"p{number}", **fixed})
        for k, answer in enumerate(several):
            key = f"p{number}:{k}"
            tokens = len(answer["output"].split())
            whole = {"tokens": tokens, "finish": "stop", "token_ids": [number, k, 9], **answer}
            made.append({"id": key, "prompt_id": f"p{number}", "k": k, **whole})
            if scores is not None:
                same = digest([answer["output"].encode()], 8)
                scored.append({"id": key, "answer": same, "score": scores[text][k], "why": ""})
    for name, rows in {"prompts": asked, "answers": made, "scores-s": scored}.items():
        if rows:
            with Records(folder, name, settings) as records:
                records.append(rows)
    return folder
