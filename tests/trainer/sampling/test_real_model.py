"""Models of text, scored by a rule, paired and trained: fresh samples follow the rule better."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from widemargin.trainer.cli import main

from bench.lib import real_model
from tests.support.eval_files import REAL
from tests.support.sampling import prompts_file, records

TOPICS = ("a lighthouse", "two old friends", "a lost key", "the first snow", "a night train")
ASKS = (
    "Write two sentences about {}.",
    "Describe {} to a child.",
    "Give me an idea for a picture of {}.",
    "What could one ask about {}?",
)
RULE = """
def short_words(prompt, answer, row):
    words = answer.split()
    return sum(len(word.strip(".,!?")) <= 4 for word in words) / max(1, len(words))
"""


SMALL = REAL.parent / "small_lm"
SMALL_RUN = {"objective": "dpo", "learning_rate": 1e-3, "num_train_epochs": 2}
"""A weak model falls apart under a reference-free loss at this rate, and learns nothing at lower
ones in a minute; DPO holds it near its start. Seeds 0 to 2 gained 0.06, 0.12 and 0.05, where means
of 80 answers differ by 0.02 or less by chance."""
REAL_RUN = {"objective": "simpo", "learning_rate": 3e-4, "num_train_epochs": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "run", "seed"),
    [
        pytest.param(SMALL, SMALL_RUN, 0, id="small"),
        pytest.param(SMALL, SMALL_RUN, 1, id="small, other seed"),
        pytest.param(real_model.FOLDER, REAL_RUN, 0, id="real"),
    ],
)
def test_training_on_scored_samples_raises_the_score_of_fresh_ones(
    tmp_path, monkeypatch, folder, run, seed
):
    """The rule is the share of short words; prompts of the fresh samples are other ones."""
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"{folder} is not here; make real-model makes the real one")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULE)
    asked = [{"prompt": ask.format(topic)} for topic in TOPICS for ask in ASKS]
    source = prompts_file(tmp_path, asked[:12], "train.jsonl")
    fresh = prompts_file(tmp_path, asked[12:], "fresh.jsonl")
    model = str(folder)

    def scored(source: str, model: str, folder: str, n: int) -> float:
        sampling = ["--n", str(n), "--max_new_tokens=40", "--device=cpu", "--temperature=1"]
        sampling.append(f"--seed={seed}")
        assert main(["generate", source, "--model", model, "--out", folder, *sampling]) == 0
        assert main(["score", folder, "--by", "python:rules:short_words", "--name", "s"]) == 0
        made: list[dict[str, Any]] = records(Path(folder), "scores-s")
        return statistics.fmean(row["score"] for row in made if row["score"] is not None)

    before = scored(fresh, model, "before", 10)
    scored(source, model, "answers", 8)
    pair = [
        "pair",
        "answers",
        "--out",
        "pairs.jsonl",
        "--rule",
        "best-vs-rest",
        "--keep-unfinished",
    ]
    assert main([*pair, "--tokens-for", model]) == 0
    settings = {
        "model_name_or_path": model,
        "dataset": "pairs.jsonl",
        "use_peft": True,
        "lora_r": 16,
        "lora_target_modules": "all-linear",
        "seed": seed,
        "per_device_train_batch_size": 4,
        "output_dir": "run",
        "use_cpu": True,
        "save_strategy": "no",
        **run,
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "my.yaml"]) == 0
    after = scored(fresh, "run", "after", 10)
    print(json.dumps({"before": before, "after": after}))
    assert after > before + 0.02
