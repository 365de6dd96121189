"""`widemargin quickstart`: make a data set and a tiny model, train it, show what changed.

Training itself is the ordinary `widemargin train` with `configs/train/quickstart.yaml`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from .data import Pair, make_pairs, write_dataset
from .model import write_model

DEFAULT_FOLDER = Path("outputs/quickstart")
CONFIG = "configs/train/quickstart.yaml"
"""As `widemargin train` finds it from any folder."""
SCORED_PROMPTS = 64
SHOWN_PROMPTS = 3
ANSWER_TOKENS = 32

Train = Callable[[str, Sequence[str]], int]
"""A training by the path of a config and its overrides."""


def add_quickstart(commands: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "quickstart",
        help="make data and a tiny model, train it, show a report",
        description="Train a tiny model on generated preference pairs and write a report.",
        epilog="Other --key=value options override the settings of configs/train/quickstart.yaml.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of data, model and training (default: %(default)s)",
    )


def quickstart(folder: Path, seed: int, overrides: Sequence[str], train: Train) -> int:
    """Write data/ and model/ to `folder`, train into run/, and show answers before and after.

    Training prints the table of metrics itself. `train` is what `widemargin train` calls; it comes
    as an argument, because this room may not import the modules that run a training.
    """
    from ..report.write import write_report
    from ..settings.files import parse_overrides

    parse_overrides(overrides)  # refuses before anything is written
    train_pairs, test_pairs = make_pairs(seed)
    _no_loading_bars()
    counts = f"{len(train_pairs)} training pairs and {len(test_pairs)} held-out pairs"
    _say(f"Writing {counts} to {folder}/data")
    write_dataset(folder / "data", train_pairs, test_pairs)
    _say(f"Writing a tokenizer and a model with random weights to {folder}/model")
    write_model(folder / "model", [*train_pairs, *test_pairs], seed)
    scored = test_pairs[:SCORED_PROMPTS]
    before = answers(folder / "model", scored)

    settings = [f"--seed={seed}"] if seed else []
    if folder != DEFAULT_FOLDER:
        settings += [
            f"--model_name_or_path={folder / 'model'}",
            f"--dataset={folder / 'data'}",
            f"--output_dir={folder / 'run'}",
        ]
    with as_file(files("widemargin.configs") / "train" / "quickstart.yaml") as config:
        train(str(config), [*settings, *overrides])
    after = answers(folder / "run", scored)
    add_samples(folder / "run", scored, before, after)
    report = write_report(folder / "run")
    _say(
        "",
        *_comparison(scored, before, after),
        "",
        f"Report: {report}",
        *_next(folder, [*settings, *overrides]),
    )
    return 0


def _no_loading_bars() -> None:
    """Progress bars of saving and loading a tiny model say nothing; training keeps its own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def answers(model_folder: Path, pairs: Sequence[Pair]) -> list[str]:
    """What the model in `model_folder` answers to each prompt, its likeliest token each time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_folder), padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(str(model_folder))
    prompts = [
        tokenizer.apply_chat_template(
            pair.row()["prompt"], add_generation_prompt=True, tokenize=False
        )
        for pair in pairs
    ]
    inputs = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.eval().generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def add_samples(
    run_dir: Path, pairs: Sequence[Pair], before: Sequence[str], after: Sequence[str]
) -> None:
    """Add a few answers and the number of right ones to the run's notes, for its report."""
    path = run_dir / "run.json"
    notes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    notes["samples"] = [
        {"prompt": pair.prompt, "before": old, "after": new}
        for pair, old, new in zip(pairs, before, after, strict=True)
    ][:SHOWN_PROMPTS]
    notes["summary"] = {
        **(notes.get("summary") or {}),
        "held-out prompts answered": len(pairs),
        "right answers before": count_right(pairs, before),
        "right answers after": count_right(pairs, after),
    }
    path.write_text(json.dumps(notes, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def count_right(pairs: Sequence[Pair], texts: Sequence[str]) -> int:
    """How many answers are exactly the chosen one."""
    return sum(text.strip() == pair.chosen for pair, text in zip(pairs, texts, strict=True))


def _comparison(pairs: Sequence[Pair], before: Sequence[str], after: Sequence[str]) -> list[str]:
    lines = [
        f"Right answers to {len(pairs)} held-out prompts: "
        f"{count_right(pairs, before)} -> {count_right(pairs, after)}"
    ]
    for pair, old, new in list(zip(pairs, before, after, strict=True))[:SHOWN_PROMPTS]:
        lines += [f"  {pair.prompt}", f"    before: {_short(old)}", f"    after:  {_short(new)}"]
    return lines


def _next(folder: Path, settings: Sequence[str]) -> list[str]:
    """Commands, to be pasted into a shell, that train with another value and compare the runs."""
    other = folder / "beta-4"
    given = [setting for setting in settings if not setting.startswith("--output_dir")]
    train = ["train", CONFIG, *given, "--beta=4", f"--output_dir={other}"]
    compare = ["report", str(folder / "run"), str(other)]
    return [
        f"Next: {shlex.join(['widemargin', *train])}",
        f"      {shlex.join(['widemargin', *compare])}",
    ]


def _short(text: str, width: int = 72) -> str:
    """The text on one line, without control characters, cut to `width`."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(line.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)
