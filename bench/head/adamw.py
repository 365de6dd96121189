"""What AdamW makes of the head's approximate gradients, and what exactness costs, by `tail_eps`.

`python -m bench.head.adamw --model DIR --pairs FILE` trains five AdamW steps of SimPO (fp32,
constant rate) from the same weights on the same pairs: with the exact tail, with the mean tail at
each `tail_eps`, with and without tops, and with the exact tail under bf16 autocast. `distance` is
how far the weights end from exact's, as a share of the update that exact makes: AdamW divides by a
gradient's own size, so a rare token's row counts by its direction. `margin_gap` is the same of the
margins of pairs not trained on. Times are of the head alone, on more pairs, with the logits as they
are and doubled. No GPU.
"""

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from widemargin.kernels.linear_logprob import linear_logprob, routing
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.objectives import build_objective

from bench.head.active import load_batches, real_states
from bench.head.providers import PROVIDERS
from bench.lib.exact import exact, relative_error
from bench.lib.peaked import PeakedCase
from bench.lib.record import Row, add_output_options, destination, environment, keep_others, writer
from bench.lib.states import sharpened
from bench.lib.timing import timed

EXPONENTS = (-12, -14, -16, -17)
STEPS, LEARNING_RATE, MAX_GRAD_NORM = 5, 1e-5, 1.0
"""As the trainer clips: AdamW's epsilon silences the rows whose clipped gradients are tiny."""
SHARPEN = 2.0
"""Of the logits that are timed a second time, with the entropy of a stronger model."""
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to the gradients; tail_eps 0 is the exact tail."""

    tail_eps: float
    tops: bool = True
    autocast: bool = False

    @property
    def head(self) -> dict[str, Any]:
        return {"tail": "mean", "tail_eps": self.tail_eps} if self.tail_eps else {"tail": "exact"}

    def routed(self) -> Any:
        """A context, forward and backward in it: no element reaches an infinite cut."""
        return mock.patch.object(routing, "TOP_CUT", routing.TOP_CUT if self.tops else math.inf)


EXACT = Way(0.0)
BF16 = Way(0.0, autocast=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.head.adamw", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a causal model's folder")
    parser.add_argument("--pairs", type=Path, required=True, help="preference pairs")
    parser.add_argument("--rows", type=int, default=2, help="pairs a step (default 2)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens (default 128)")
    parser.add_argument("--timed-rows", type=int, default=8, help="pairs to time with (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="of each time (default 3; 0: none)")
    parser.add_argument("--exponents", type=int, nargs="+", default=EXPONENTS)
    add_output_options(parser, "adamw.json")
    return parser.parse_args(arguments)


def pair_margins(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """SimPO's losses and margins [P]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "select", "targets")}
    answer = build_objective("simpo")(model(**inputs).token_logps, batch["cu_seqlens"])
    return answer.losses, answer.chosen_rewards - answer.rejected_rewards


def trained(model: Any, start: dict[str, Tensor], batches: Iterable[Batch], way: Way) -> None:
    """Take one step on each batch, from the weights of ``start``."""
    model.load_state_dict(start)
    patch_head(model, **way.head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    for batch in batches:
        with way.routed():
            with torch.autocast("cpu", torch.bfloat16, enabled=way.autocast):
                losses, _ = pair_margins(model, batch)
            losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


def distances(
    model: Any, start: dict[str, Tensor], aim: dict[str, Tensor], head: Tensor
) -> dict[str, float]:
    """Of the weights from ``aim``, as shares of the way from ``start``: all, head, others."""
    squares = {"head": [0.0, 0.0], "others": [0.0, 0.0]}
    for name, weight in model.named_parameters():
        kind = squares["head" if weight is head else "others"]
        kind[0] += float((weight.detach() - aim[name]).double().square().sum())
        kind[1] += float((aim[name] - start[name]).double().square().sum())
    squares["all"] = [sum(pair) for pair in zip(*squares.values(), strict=True)]
    return {name: math.sqrt(gap / update) for name, (gap, update) in squares.items()}


def head_rows(case: PeakedCase, ways: list[Way], repeats: int) -> dict[Way, Row]:
    """The head's time, best of ``repeats``, as a share of full logits', and its errors."""
    expected = exact(case)
    leaves = [x.detach().requires_grad_() for x in (case.hidden, case.weight)]

    def once(head: Any) -> tuple[float, tuple[Tensor, ...]]:
        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(head(*leaves, case.targets), leaves, case.coefficients)

        found, ms = timed(both, cuda=False)
        return ms, found

    def full(*inputs: Tensor) -> Tensor:
        return PROVIDERS["full-logits"].forward(*inputs)[0]

    best, errors = dict.fromkeys((None, *ways), math.inf), {}
    for _ in range(repeats):
        for way in best:
            with way.routed() if way else contextlib.nullcontext():
                head = full if way is None else lambda *x, w=way: linear_logprob(*x, **w.head)
                ms, found = once(head)
            best[way] = min(best[way], ms)
            errors[way] = [
                relative_error(a, b)
                for a, b in zip(found, (expected.dhidden, expected.dweight), strict=True)
            ]
    return {
        way: {
            "total_ms": best[way],
            "times_full_logits": best[None] / best[way],
            "errors": dict(zip(("dhidden", "dweight"), errors[way], strict=True)),
        }
        for way in ways
    }


def training_rows(
    model: Any, batches: list[Batch], held_out: Batch, ways: list[Way]
) -> Iterator[tuple[Way, Row]]:
    """How far each way ends from exact's weights, and from its margins on ``held_out``."""
    model.requires_grad_(True)
    start = {name: x.clone() for name, x in model.state_dict().items()}
    head = model.get_output_embeddings().weight

    def margins() -> Tensor:
        with torch.no_grad():
            return pair_margins(model, held_out)[1]

    patch_head(model)
    before = margins()
    trained(model, start, batches, EXACT)
    aim = {name: x.clone() for name, x in model.state_dict().items()}
    aimed = margins()
    for way in ways:
        trained(model, start, batches, way)
        gap = (margins() - aimed).norm() / (aimed - before).norm()
        yield way, {"distance": distances(model, start, aim, head), "margin_gap": float(gap)}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out, commit = destination(options, "adamw.json")
    model, batches = load_batches(
        options.model, options.pairs, options.rows, options.max_length, STEPS + 1
    )
    *steps, held_out = batches
    tokens = sum(len(batch["targets"]) for batch in steps) // STEPS
    shared = {"op": "adamw", "case": options.model.name, **environment("cpu", commit)}
    shared |= {"tokens_per_step": tokens, "pairs_per_step": options.rows, "steps": STEPS}
    means = [Way(2.0**e, tops) for tops in (True, False) for e in options.exponents]
    rows: dict[Way, Row] = {}
    kept = keep_others(out, [shared], ("case",))
    write = writer(out)
    for way, row in training_rows(model, steps, held_out, [*means, BF16]):
        print(way, row, flush=True)
        rows[way] = shared | dataclasses.asdict(way) | row
        write(kept + list(rows.values()))
    if options.repeats:
        case = real_states(options.model, options.pairs, options.timed_rows, 512)
        for way, row in head_rows(case, [EXACT, *means], options.repeats).items():
            before = rows.get(way, shared | dataclasses.asdict(way))
            rows[way] = before | row | {"timed_tokens": len(case.targets)}
        sharp = sharpened(case, SHARPEN)
        for way, row in head_rows(sharp, [EXACT, *means], options.repeats).items():
            rows[way]["sharpened"] = {"factor": SHARPEN, "entropy": sharp.entropy, **row}
        write(kept + list(rows.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
