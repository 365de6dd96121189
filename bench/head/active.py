"""How much of the head's backward is left, on real hidden states: work against gradient error.

`python -m bench.head.active --model DIR --pairs FILE` runs models over preference pairs, takes the
hidden states that predict completion tokens and the gradient that SimPO gives their log-probs, and
counts for each `tail_eps` what routing computes, as single pairs (torch) and as cells (Triton),
with the error of the gradients beside it. `--sharpen` multiplies the logits, to reach the entropy
of a stronger model; rows say so. Writes JSON and a plot. No GPU.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from widemargin.kernels.linear_logprob.routing import BLOCK, route, routing_stats
from widemargin.kernels.linear_logprob.torch_backward import FULL_FRACTION, Backward
from widemargin.kernels.linear_logprob.torch_forward import forward
from widemargin.kernels.linear_logprob.types import GradRequest, HeadCall

from bench.head.cells import choose_cells
from bench.head.plot import draw_active
from bench.lib.exact import Exact, exact, relative_error
from bench.lib.peaked import PeakedCase, fp32_logps, peaked_case
from bench.lib.record import Row, add_output_options, destination, environment, writer
from bench.lib.states import save_states, sharpened

EXPONENTS = range(-17, -7)
"""From the trainer's `tail_eps` past the op's."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.head.active", description=__doc__)
    models_help = "folders of causal language models"
    parser.add_argument("--model", type=Path, nargs="+", required=True, help=models_help)
    pairs_help = "preference pairs, as for training"
    parser.add_argument("--pairs", type=Path, required=True, help=pairs_help)
    parser.add_argument("--rows", type=int, default=8, help="pairs to use (default 8)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens (default 512)")
    parser.add_argument("--sharpen", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--peaked", action="store_true", help="the standard peaked case as well")
    parser.add_argument(
        "--write-states", type=Path, help="write the first model's states for bench.head, and stop"
    )
    add_output_options(parser, "active.json")
    return parser.parse_args(arguments)


def load_batches(
    model_dir: Path, pairs: Path, rows: int, max_length: int, count: int = 1
) -> tuple[Any, list[dict[str, Any]]]:
    """The model in fp32, and ``count`` batches of ``rows`` pairs each."""
    from widemargin.trainer.data import DataSettings, load_pairs
    from widemargin.trainer.model.loading import ModelSettings, load_model, load_tokenizer
    from widemargin.trainer.packing import PairCollator

    settings = ModelSettings(model_name_or_path=str(model_dir), dtype="float32")
    tokenizer, model = load_tokenizer(settings), load_model(settings).eval()
    data = DataSettings(
        dataset=str(pairs), max_length=max_length, max_prompt_length=max_length // 2
    )
    train = load_pairs(data, tokenizer).train
    assert train is not None
    assert isinstance(tokenizer.pad_token_id, int)
    collate = PairCollator(tokenizer.pad_token_id)
    taken = [train[i] for i in range(min(count * rows, len(train)))]
    return model, [collate(taken[i : i + rows]) for i in range(0, len(taken), rows)]


def real_states(model_dir: Path, pairs: Path, rows: int, max_length: int) -> PeakedCase:
    """Hidden states [N, H] of the pairs' completions, and SimPO's gradient for their log-probs."""
    from widemargin.trainer.objectives import build_objective

    model, (batch,) = load_batches(model_dir, pairs, rows, max_length)
    decoder: Any = model.get_decoder()
    with torch.no_grad():
        states = [
            decoder(input_ids=ids[None], attention_mask=mask[None], use_cache=False)[0][0]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        hidden = torch.stack(states).flatten(0, 1)[batch["select"]]
        head: Any = model.get_output_embeddings()
        weight = head.weight.detach().contiguous()
    logps = fp32_logps(hidden, weight, batch["targets"]).requires_grad_()
    build_objective("simpo")(logps, batch["cu_seqlens"]).losses.sum().backward()
    assert logps.grad is not None
    return PeakedCase(hidden, weight, batch["targets"], logps.grad, 0.0, 1.0)


def routings(case: PeakedCase) -> Iterator[Row]:
    """One row per routing and `tail_eps`: active fraction, passes, errors."""
    call = HeadCall(case.hidden, case.weight, None, 1.0, None, torch.float32)
    saved = forward(call, case.targets, keep=True, profile=True, tops=True)
    scored = torch.ones_like(case.targets, dtype=torch.bool)
    expected: Exact = exact(case)
    for exponent in EXPONENTS:
        eps = 2.0**exponent
        for form in ("pairs", "cells"):
            request = GradRequest(
                case.coefficients, scored, eps, hidden=True, weight=True, bias=False
            )
            if form == "pairs":
                routed = route(saved, request, FULL_FRACTION)
            else:
                routed = choose_cells(saved, request)[0]
            fraction, mean, top, _ = routing_stats(routed, scored).tolist()
            got = Backward(call, saved, request).run(routed)
            assert got.hidden is not None
            assert got.weight is not None
            yield {
                "form": form,
                "tail_eps": eps,
                "active_fraction": fraction,
                "tops_per_token": int(routed.tops.sum()) / len(case.targets),
                # Recompute, dH and dW over the active part, and the tail's two thin products.
                "backward_passes": 3 * fraction + 2 / BLOCK,
                "forward_passes": 1.0,
                "averaged_mass_mean": mean,
                "averaged_mass_max": top,
                "errors": {
                    "dhidden": relative_error(got.hidden, expected.dhidden),
                    "dweight": relative_error(got.weight, expected.dweight),
                },
            }


def line(row: Row) -> str:
    return (
        f"{row['case']:24} entropy {row['entropy']:.2f}  {row['form']}  "
        f"eps 2^{math.log2(row['tail_eps']):.0f}  active {row['active_fraction']:.3f}  "
        f"passes 1 + {row['backward_passes']:.2f}  "
        f"dH {row['errors']['dhidden']:.1e}  dW {row['errors']['dweight']:.1e}"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    wanted = {"pairs": options.pairs, "rows": options.rows, "max_length": options.max_length}
    take = partial(real_states, **wanted)
    if options.write_states:
        save_states(take(options.model[0]), options.write_states)
        return 0
    out, commit = destination(options, "active.json")
    rows = []
    for folder in options.model:
        states = take(folder)
        for factor in options.sharpen:
            name = folder.name + (f", logits x {factor:g}" if factor != 1 else "")
            rows += measured(name, sharpened(states, factor))
    if options.peaked:
        rows += measured("standard peaked case", peaked_case(1024, 512, 131072))
    shared = {"op": "active", **environment("cpu", commit)}
    writer(out)([shared | row for row in rows])
    draw_active(rows, out.with_suffix(".png"))
    return 0


def measured(name: str, case: PeakedCase) -> list[Row]:
    """The rows of one case, printed as they come."""
    shape = {"tokens": len(case.hidden), "hidden_size": case.hidden.shape[1]}
    shape |= {"vocab": len(case.weight), "sharpen": case.sharpness, "entropy": case.entropy}
    rows = []
    for row in routings(case):
        rows.append({"case": name, **shape, **row})
        print(line(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
