"""One situation: what is given, in TRL's words, and what is done with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings.files import build_config

from tests.trl_situations import materials

BASE = {
    "use_cpu": True,
    "report_to": "none",
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": 64,
    "max_prompt_length": 32,
    "write_report": False,
}


@dataclass(frozen=True)
class Situation:
    """``test`` of TRL's tests of a trainer, in ``case`` where it has several.

    Attributes:
        settings: as TRL's class of settings has them; what makes runs short is added.
        model, data, evaluation, later, tokenizer, adapter: names in `materials`; ``later`` is what
            is evaluated once the trainer is made or, after ``then: train``, has trained.
        arguments: further ones of the trainer.
        then: "train", "evaluate" without training, or "make" alone.
        said: part of the line that refuses it; "" where it runs.
        instead: settings that the line asks for, with which it must run.
        check: of the trainer at the end.
        quick: whether it is tried in every run of the tests, and not only in slow ones.
    """

    trainer: str
    test: str
    case: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "qwen2"
    data: str = "standard"
    evaluation: str = ""
    later: str = ""
    tokenizer: str = "plain"
    adapter: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    then: str = "train"
    said: str = ""
    instead: dict[str, Any] | None = None
    check: Callable[[Any], bool] | None = None
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.trainer} {self.test}" + (f" [{self.case}]" if self.case else "")


def attempt(situation: Situation, folder: Path) -> str:
    """ "" where it ran, or the line that refused it; what it asks for has then been tried too.

    Raises:
        AssertionError: it ran and did not do what it should.
    """
    try:
        _carry_out(situation, situation.settings, folder)
    except UserError as error:
        if situation.instead is not None:
            _carry_out(situation, situation.instead, folder / "instead")
        return " ".join(str(error).split())
    return ""


def _carry_out(situation: Situation, settings: dict[str, Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    trainer = _made(situation, settings, folder)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    if situation.then == "train":
        loss = trainer.train().training_loss
        assert math.isfinite(loss), loss
        after = dict(trainer.model.named_parameters())
        changed = [p for name, p in after.items() if not torch.equal(before[name], p)]
        assert changed
        assert all(p.requires_grad for p in changed)
    if situation.later:
        _check_losses(trainer.evaluate(materials.data(situation.later)), situation.later)
    elif situation.evaluation and situation.then != "make":
        _check_losses(trainer.evaluate(), situation.evaluation)
    assert situation.check is None or situation.check(trainer)


def _made(situation: Situation, settings: dict[str, Any], folder: Path) -> PreferenceTrainer:
    notes: list[str] = []
    given = BASE | {"output_dir": str(folder / "run")} | settings
    arguments = {
        "eval_dataset": materials.data(situation.evaluation) if situation.evaluation else None,
        "processing_class": materials.TOKENIZERS[situation.tokenizer](),
        "peft_config": materials.ADAPTERS[situation.adapter]() if situation.adapter else None,
    }
    for name, value in situation.arguments.items():
        arguments[name] = value() if name == "ref_model" and callable(value) else value
    model = materials.model(situation.model, folder)
    if arguments.get("ref_model") == "the model itself":
        arguments["ref_model"] = model
    config = build_config(given, notes=notes)
    return PreferenceTrainer(
        model, config, train_dataset=materials.data(situation.data), **arguments
    )


def _check_losses(metrics: dict[str, float], name: str) -> None:
    prefixes = ["data1_", "data2_"] if name.endswith("s") else [""]
    for prefix in prefixes:
        assert math.isfinite(metrics[f"eval_{prefix}loss"])
