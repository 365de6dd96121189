"""Tune a real model for 96 steps and see what it answers before and after: `make demo`.

The pairs are those of --train and --test: JSONL, perhaps gzipped, with prompt, chosen and rejected
as messages. Where these files are absent, the quickstart's generated pairs stand in for them.
Other --key=value options override examples/demo.yaml.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from widemargin.trainer.cli import main as widemargin
from widemargin.trainer.monitor.history import load_run
from widemargin.trainer.quickstart.data import make_pairs
from widemargin.trainer.report.samples import by_prompt

ROOT = Path(__file__).resolve().parent.parent
JUDGED = ROOT.parent / "shared" / "data"
LONGEST = 160
"""Tokens of prompt and answer; longer pairs are left out."""
HELD_OUT = 32
QUESTIONS = 5

Rows = list[dict[str, Any]]


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="examples/demo.py", description=__doc__)
    model = ROOT / "build" / "SmolLM2-135M-Instruct"
    parser.add_argument("--model", type=Path, default=model, help="folder (make real-model)")
    parser.add_argument("--train", type=Path, default=JUDGED / "judged_pairs_train.jsonl.gz")
    parser.add_argument("--test", type=Path, default=JUDGED / "judged_pairs_test.jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    options, overrides = parser.parse_known_args()
    if not (options.model / "config.json").is_file():
        parser.error(f"--model: run `make real-model`, or name a model; {options.model} has none")
    return options, overrides


def read(path: Path) -> Rows:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


def pairs_of(options: argparse.Namespace) -> tuple[Rows, Rows]:
    """To train on and to test with."""
    missing = [str(path) for path in (options.train, options.test) if not path.is_file()]
    if missing:
        print(f"{' and '.join(missing)}: not there; the quickstart's generated pairs are used")
        train, test = make_pairs()
        return [pair.row() for pair in train], [pair.row() for pair in test]
    return read(options.train), read(options.test)


def short(rows: Rows, tokenizer: Any) -> Rows:
    """The pairs that fit whole."""

    def tokens(row: dict[str, Any], side: str) -> int:
        text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    sides = ("chosen", "rejected")
    return [row for row in rows if max(tokens(row, side) for side in sides) <= LONGEST]


def one_of_each(rows: Rows) -> Rows:
    """A pair of every prompt first, so that the questions differ; then the others."""
    first = {json.dumps(row["prompt"]): row for row in reversed(rows)}
    return [*reversed(first.values()), *(row for row in rows if row not in first.values())]


def main() -> int:
    options, overrides = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, test = (short(rows, tokenizer) for rows in pairs_of(options))
    data = options.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", one_of_each(test)[:HELD_OUT])):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    run = options.out / "run"
    places = [f"--model_name_or_path={options.model}", f"--dataset={data}", f"--output_dir={run}"]
    status = widemargin(["train", str(ROOT / "examples" / "demo.yaml"), *places, *overrides])
    if status == 0:
        show(run)
    return status


def show(run: Path) -> None:
    """The questions, each answered before and after."""
    for prompt, answers in by_prompt(load_run(run))[:QUESTIONS]:
        print(f"\n{prompt.strip()}")
        for when, step in (("before", min(answers)), ("after", max(answers))):
            row = answers[step]
            print(f"  {when}: {row['tokens']} tokens, margin {row['margin']:+.2f}")
            print(f"    {row['answer'].strip()}")
    print(f"\nReport: {run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
