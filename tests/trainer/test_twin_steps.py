"""Five AdamW steps of a twin, by its default settings, and of the published formula told plainly.

In fp32; SimPO's for tokenizers and templates in the style of each family that the published runs
are of. Every step takes all pairs, so their order is no matter; LMPO and gamma-PO, whose pairs
depend on each other and on earlier ones, take them in one micro-batch.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from widemargin.trainer.cli import main

from tests.support.tiny_models import tiny_model
from tests.trainer.data.test_separate import make, published_ids

PAIRS, STEPS = 8, 5
BETA, RATIO, TAU = 2.0, 0.25, 1.0  # of the scripts' settings classes
GAMMA = BETA * RATIO
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


def twin(
    folder: Path, name: str, tokenizer: Any, model: Any, script: str, **changes: Any
) -> dict[str, Tensor]:
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
        "num_train_epochs": STEPS,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "max_length": MAX_LENGTH,
        "max_prompt_length": MAX_PROMPT,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "write_report": False,
    }
    settings |= changes
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(folder / "c.yaml")], script=script) == 0
    return load_file(folder / "run" / "model.safetensors")


def mean_logps(model: Any, sequences: list[tuple[list[int], list[int]]]) -> Tensor:
    """Of each answer's tokens after its prompt, from the logits of a padded batch."""
    tokens = [torch.tensor(prompt + answer) for prompt, answer in sequences]
    ids = pad_sequence(tokens, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(each)] for each in tokens])
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    starts = torch.tensor([[len(prompt) - 1] for prompt, _ in sequences])
    scored = mask[:, 1:] & (torch.arange(ids.shape[1] - 1) >= starts)
    return (logps * scored).sum(1) / scored.sum(1)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Losses of P pairs by means and lengths of 2P answers, chosen first, and the reference's means."""


def simpo(means: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = means.chunk(2)
    return -logsigmoid(BETA * (chosen - rejected - RATIO))


def lmpo() -> Loss:
    """Mean a and deviation b of the margins start at zero and are not corrected for it.

    With the 1e-6 of the list of departures beside b.
    """
    a = b = torch.zeros(())

    def losses(means: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        nonlocal a, b
        chosen, rejected = means.chunk(2)
        with torch.no_grad():
            average = lengths.unflatten(0, (2, -1)).double().mean(0).repeat(2)
            p_w, p_l = (means * average / lengths).exp().chunk(2)
            margins = (1 - p_w) * (1 - (p_w - p_l) ** 5) / 2
            a, b = 0.9 * a + 0.1 * margins.mean(), 0.9 * b + 0.1 * margins.std()
            z = (margins - a) / (b + 1e-6)
        gaps = BETA * (chosen - rejected) - 0.2 * z
        return -(1 / (1 + math.exp(GAMMA) * (-gaps).exp())).log()

    return losses


def gamma_po(of_reference: bool) -> Loss:
    """Margins from 20 passes over these gaps and all earlier ones.

    There are none at first, as the list of departures has it: the scripts' queue starts with eight
    random numbers. There are never more than 256, so none are drawn by chance.
    """
    queue: list[float] = []

    def target_margins(gaps: Tensor) -> Tensor:
        known = torch.cat([torch.tensor(queue), gaps.detach()])
        n = len(known)
        p = torch.full_like(known, 1 / n)
        margins = p
        for _ in range(20):
            margins = GAMMA * n * p
            slope = TAU * (1 + (n * (p + 1e-10)).log()) + GAMMA / (1 + (known - margins).exp())
            p = p * (-min(0.5 / TAU, 1) * slope).exp()
            p = p / p.sum()
        queue.extend(gaps.tolist())
        return margins[-len(gaps) :]

    def losses(means: Tensor, lengths: Tensor, reference: Tensor) -> Tensor:
        chosen, rejected = (means - reference if of_reference else means).chunk(2)
        gaps = BETA * (chosen - rejected)
        return -logsigmoid(gaps - target_margins(gaps) + (GAMMA if of_reference else 0.0))

    return losses


def plain(
    model: Any, tokenizer: Any, losses: Loss, micro_batch: int, rate: float
) -> dict[str, Tensor]:
    """The published trainer's loss and transformers' loop, in a few lines of torch."""
    pairs = [
        published_ids(tokenizer, row, True, MAX_LENGTH, MAX_PROMPT, True) for row in conversations()
    ]
    frozen = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2
    )
    for _ in range(STEPS):
        for start in range(0, PAIRS, micro_batch):
            batch = pairs[start : start + micro_batch]
            sequences = [pair[side] for side in (0, 1) for pair in batch]
            lengths = torch.tensor([len(answer) for _, answer in sequences])
            with torch.no_grad():
                reference = mean_logps(frozen, sequences)
            loss = losses(mean_logps(model, sequences), lengths, reference).mean()
            (loss * micro_batch / PAIRS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_same_updates(
    folder: Path,
    family: str,
    model: Any,
    losses: Loss,
    micro_batch: int,
    script: str,
    rate: float = 1e-4,
    **given: Any,
) -> None:
    """The twin's weights are the plain loop's, within 1e-3 of the update."""
    tokenizer = make(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sizes = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": PAIRS // micro_batch,
        "learning_rate": rate,
    }
    found = twin(folder, NAMES[family], tokenizer, model, script, **sizes, **given)
    expected = plain(model, tokenizer, losses, micro_batch, rate)
    assert found.keys() == expected.keys()

    def size(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((a[name] - b[name]).double().square().sum()) for name in a))

    update = size(expected, before)
    assert update > 0.01
    assert size(found, expected) < 1e-3 * update


@pytest.mark.costly
@pytest.mark.parametrize("family", NAMES)
def test_a_twin_makes_the_published_updates(tmp_path, family):
    model = tiny_model("llama", vocab_size=len(make(family)))
    check_same_updates(tmp_path, family, model, simpo, 2, "run_simpo")


def model_that_knows_the_answers(family: str) -> Any:
    """Else every probability of an answer is nothing, and every margin of LMPO the same."""
    tokenizer = make(family)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    pairs = [
        published_ids(tokenizer, row, True, MAX_LENGTH, MAX_PROMPT, True) for row in conversations()
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):
        (-mean_logps(model, [side for pair in pairs for side in pair]).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.costly
def test_lmpos_twin_makes_the_published_updates(tmp_path):
    model = model_that_knows_the_answers("llama3")
    check_same_updates(tmp_path, "llama3", model, lmpo(), PAIRS, "run_lmpo")


@pytest.mark.costly
@pytest.mark.parametrize(
    ("trainer_type", "loss", "rate"), [("simpo", "gm-simpo", 1e-4), ("dpo", "gm-dpo", 1e-2)]
)
def test_gamma_pos_twin_makes_the_published_updates(tmp_path, trainer_type, loss, rate):
    """gamma-dpo's gaps are all 0 at first, and margins differ only as they grow."""
    model = model_that_knows_the_answers("qwen2.5")
    losses = gamma_po(of_reference=trainer_type == "dpo")
    named = {"trainer_type": trainer_type, "loss_type": loss}
    check_same_updates(tmp_path, "qwen2.5", model, losses, PAIRS, "run_xpo", rate, **named)
