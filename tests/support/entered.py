"""Files entered on three ways through the project: `python -m tests.support.entered`.

- *step*: from a YAML to the end of the first optimizer step;
- *inputs*: from a dataset's rows to the inputs of the model;
- *gradient*: from hidden states to the loss and back, with the torch backend.

A file is entered when one of its functions runs; what runs while a module is imported does not
count. Exit status 1: a way enters more files than `LIMITS` allows.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_post_hook
from widemargin.kernels.linear_logprob import linear_logprob
from widemargin.trainer.data import tokenize_pairs
from widemargin.trainer.objectives import build_objective
from widemargin.trainer.packing import model_inputs
from widemargin.trainer.settings.files import load_config
from widemargin.trainer.train import train

from tests.support.tiny_models import TOKENIZER, tiny_model, tiny_pairs, tiny_trainer

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"step": 40, "inputs": 12, "gradient": 9}


class Entered:
    """Notes the files that are entered between `start` and `stop`, in order."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._seen: set[str] = set()

    def start(self) -> None:
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # pyright: ignore[reportArgumentType]

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        is_function = code.co_flags & inspect.CO_NEWLOCALS and code.co_flags & inspect.CO_OPTIMIZED
        if event != "call" or not is_function or code.co_filename in self._seen:
            return
        path = Path(code.co_filename)
        if not path.is_absolute() or not (path := path.resolve()).is_relative_to(ROOT):
            self._seen.add(code.co_filename)
        elif path.parts[len(ROOT.parts)] in ("kernels", "trainer") and not _importing(frame):
            self._seen.add(code.co_filename)
            self.files.append(str(path.relative_to(ROOT)))


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") != "__main__":
            return True
        frame = frame.f_back
    return False


def step(entered: Entered, folder: Path) -> None:
    tiny_model().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    tiny_pairs(8).to_json(folder / "pairs.jsonl")
    settings = {
        "model_name_or_path": str(folder / "model"), "dataset": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "run"), "objective": "simpo", "max_steps": 1,
        "per_device_train_batch_size": 4, "max_length": 64, "save_strategy": "no",
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "write_report": False,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    hook = register_optimizer_step_post_hook(lambda *_: entered.stop())
    try:
        entered.start()
        train(load_config(path, []))
    finally:
        hook.remove()


def inputs(entered: Entered, folder: Path) -> None:
    trainer = tiny_trainer(folder)
    rows = tiny_pairs(8)
    entered.start()
    tokenize_pairs(rows, TOKENIZER)
    model_inputs(next(iter(trainer.get_train_dataloader())))


def gradient(entered: Entered, folder: Path) -> None:
    hidden = torch.randn(12, 16, requires_grad=True)
    weight = torch.randn(300, 16, requires_grad=True)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    objective = build_objective("simpo")
    entered.start()
    logps = linear_logprob(hidden, weight, torch.randint(0, 300, (12,)), backend="torch")
    objective(logps, bounds).losses.mean().backward()


WAYS: dict[str, Callable[[Entered, Path], None]] = {
    "step": step,
    "inputs": inputs,
    "gradient": gradient,
}


def files_entered(way: str) -> list[str]:
    """The files, in order of entry, from the root."""
    entered = Entered()
    with tempfile.TemporaryDirectory() as folder:
        try:
            WAYS[way](entered, Path(folder))
        finally:
            entered.stop()
    return entered.files


def main() -> int:
    found = {way: files_entered(way) for way in WAYS}
    for way, files in found.items():
        print(f"\n{way}: {len(files)} files, at most {LIMITS[way]}", *files, sep="\n  ")
    return int(any(len(files) > LIMITS[way] for way, files in found.items()))


if __name__ == "__main__":
    sys.exit(main())
