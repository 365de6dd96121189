"""Forward and backward of a whole model against the length of its sequences.

Full logits of padded sequences, as most trainers compute them, against this head on padded
sequences and on pairs that share their prompt. Two pairs; half of a chosen sequence is prompt, and
the rejected answer has three quarters of the chosen one's tokens. A way whose gradients are not
those of full logits is not timed.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.objectives import build_objective
from widemargin.trainer.packing import PairCollator, model_inputs

from bench.lib.exact import relative_error
from bench.lib.profile import profiled_run
from bench.lib.record import Row
from bench.lib.subject import find_subject
from bench.lib.timing import ColdTimer, spread
from bench.training.data import PairSource, Rows, token_rows

PAIRS = 2
MOST_ERROR = 2e-2
"""Relative, with which a way is still timed: the head's tail "mean" is not exact."""
LENGTHS = (128, 256, 512)
LAYOUTS: dict[str, Any] = {
    "full-logits": "padded",
    "widemargin-padded": "padded",
    "widemargin-prefix_shared": "prefix_shared",
}


@dataclass(frozen=True)
class Step:
    """A model and a batch: what one forward and backward needs."""

    model: Any
    batch: dict[str, Any]
    full_logits: bool

    def run(self) -> Iterable[Tensor]:
        """The gradients of SimPO's loss."""
        if self.full_logits:
            inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
            logits = self.model(**inputs, use_cache=False).logits.float()
            logps = logits.log_softmax(-1).flatten(0, 1)[
                self.batch["select"], self.batch["targets"]
            ]
            del logits
        else:
            logps = self.model(**model_inputs(self.batch)).token_logps
        loss = build_objective("simpo")(logps, self.batch["cu_seqlens"]).losses.sum()
        return torch.autograd.grad(loss, [p for p in self.model.parameters() if p.requires_grad])


def sequence_rows(lengths: Iterable[int] = LENGTHS, repeats: int = 2) -> Iterator[Row]:
    """Time and memory, by sequence length and way to compute; ways take turns."""
    with tempfile.TemporaryDirectory() as folder:
        subject = find_subject(Path(folder))
        text = token_rows(PairSource(subject.pairs, subject.model, 64, 1024, False))
        stream = [token for row in text for part in row.values() for token in part]
        build = model_builder(subject.model)
        timer = ColdTimer("cpu")
        for length in lengths:
            pairs = pairs_of(stream, length)
            steps = {name: build(name, pairs) for name in LAYOUTS}
            errors = gradient_errors(steps)
            admitted = [name for name in steps if errors[name] <= MOST_ERROR]
            peaks = {name: profiled_run(steps[name].run, "cpu")[0] for name in admitted}
            times: dict[str, list[float]] = {name: [] for name in admitted}
            for _ in range(repeats):
                for name in admitted:
                    timer.evict()
                    times[name].append(timer.time(steps[name].run)[1])
            base = statistics.median(times["full-logits"])
            for name, step in steps.items():
                row: Row = {"curve": "sequence", "case": subject.case, "provider": name}
                row |= {"length": length, "pairs": PAIRS, "errors": {"gradients": errors[name]}}
                row["computed_tokens"] = step.batch["input_ids"].numel()
                if name in admitted:
                    row |= {
                        "gate": "passed",
                        "total_ms": spread(times[name]),
                        "speedup": {"total": round(base / statistics.median(times[name]), 3)},
                        "peak_extra_mib": {"allocator": round(peaks[name] / 2**20, 2)},
                    }
                else:
                    row |= {"gate": "wrong", "reason": f"gradients are off by {errors[name]:.1e}"}
                yield row


def gradient_errors(steps: dict[str, Step]) -> dict[str, float]:
    """By name, of all gradients together against those of full logits."""
    gradients = {n: torch.cat([each.flatten() for each in step.run()]) for n, step in steps.items()}
    return {
        name: relative_error(every, gradients["full-logits"]) for name, every in gradients.items()
    }


def pairs_of(stream: list[int], length: int) -> Rows:
    """Pairs of consecutive text; a rejected answer is text from elsewhere."""
    half = length // 2
    rows = []
    for i in range(PAIRS):
        begin = i * 2 * length
        piece = [stream[(begin + j) % len(stream)] for j in range(2 * length)]
        rejected = piece[length : length + max(1, half * 3 // 4)]
        rows.append(
            {
                "prompt_ids": piece[:half],
                "chosen_ids": piece[half:length],
                "rejected_ids": rejected,
            }
        )
    return rows


def model_builder(folder: Path) -> Callable[[str, Rows], Step]:
    """A function from a way to compute and pairs to a step; each way has a model of its own."""
    models: dict[bool, Any] = {}
    for full in (True, False):
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, attn_implementation="sdpa"
        )
        models[full] = model.eval()
    patch_head(models[False])
    pad = models[True].config.pad_token_id or 0

    def build(name: str, pairs: Rows) -> Step:
        shared = LAYOUTS[name] == "prefix_shared"
        collate = PairCollator(pad, layout=LAYOUTS[name], rows="varlen" if shared else "dense")
        full = name == "full-logits"
        return Step(models[full], collate(pairs), full)

    return build
