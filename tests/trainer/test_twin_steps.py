"""Five AdamW steps of a twin, by its default settings, and of the published formula told plainly.

In fp32, for tokenizers and templates in the style of each family that the published runs are of.
Every step takes all pairs, so their order is no matter.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from widemargin.trainer.cli import main

from tests.support.tiny_models import tiny_model
from tests.trainer.data.test_separate import make, published_ids

PAIRS, STEPS, RATE = 8, 5, 1e-4
BETA, RATIO = 2.0, 0.25  # of the scripts' settings class
MAX_LENGTH, MAX_PROMPT = 40, 16

#: By family, what the model's folder is called: names with mistral get the scripts' template.
NAMES = {
    "llama3": "llama",
    "mistral": "mistral-instruct",
    "mistral, newer file": "mistral-instruct",
    "zephyr": "zephyr",
    "gemma2": "gemma",
    "qwen2.5": "chatml",
}


def conversations() -> list[dict[str, Any]]:
    """Of unequal lengths, some of them over the limits."""
    rows = []
    for i in range(PAIRS):
        asked: list[dict[str, str]] = [
            {"role": "user", "content": f"Is water wet? {'no ' * 3 * i}"}
        ]
        answers = "yes it is. " * (1 + i % 3), "Paris " * (1 + (5 * i) % 12)
        chosen, rejected = ({"role": "assistant", "content": text} for text in answers)
        rows.append({"chosen": [*asked, chosen], "rejected": [*asked, rejected]})
    return rows


def twin(folder: Path, name: str, tokenizer: Any, model: Any) -> dict[str, torch.Tensor]:
    """Weights after a run of the twin over files as published ones are."""
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    lines = [json.dumps(row) for row in conversations()]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "model_name_or_path": str(folder / name),
        "torch_dtype": None,
        "dataset_mixer": {str(folder / "data"): 1.0},
        "dataset_splits": ["train"],
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": PAIRS // 2,
        "num_train_epochs": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "max_length": MAX_LENGTH,
        "max_prompt_length": MAX_PROMPT,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "write_report": False,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(folder / "c.yaml")], script="run_simpo") == 0
    return load_file(folder / "run" / "model.safetensors")


def mean_logps(model: Any, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Of each answer's tokens after its prompt, from the logits of a padded batch."""
    tokens = [torch.tensor(prompt + answer) for prompt, answer in sequences]
    ids = pad_sequence(tokens, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(each)] for each in tokens])
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    starts = torch.tensor([[len(prompt) - 1] for prompt, _ in sequences])
    scored = mask[:, 1:] & (torch.arange(ids.shape[1] - 1) >= starts)
    return (logps * scored).sum(1) / scored.sum(1)


def plain(model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """The published trainer's loss and transformers' loop, in a few lines of torch."""
    pairs = [
        published_ids(tokenizer, row, True, MAX_LENGTH, MAX_PROMPT, True) for row in conversations()
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2
    )
    for _ in range(STEPS):
        for start in range(0, PAIRS, 2):
            batch = pairs[start : start + 2]
            means = mean_logps(model, [pair[side] for side in (0, 1) for pair in batch])
            chosen, rejected = means.chunk(2)
            loss = -logsigmoid(BETA * (chosen - rejected - RATIO)).mean()
            (loss / (PAIRS // 2)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.costly
@pytest.mark.parametrize("family", NAMES)
def test_a_twin_makes_the_published_updates(tmp_path, family):
    tokenizer = make(family)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = twin(tmp_path, NAMES[family], tokenizer, model)
    expected = plain(model, tokenizer)
    assert found.keys() == expected.keys()

    def size(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a))

    update = size(expected, before)
    assert update > 0.01
    assert size(found, expected) < 1e-3 * update
