"""Measured memory of a training micro-batch on this CPU, and the estimate of `widemargin plan`.

`PYTHONPATH=. python tests/support/measured_memory.py` prints the table of docs/plan.md.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from widemargin.trainer import PreferenceConfig
from widemargin.trainer.data.table import PairLengths
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.packing import PairCollator, model_inputs
from widemargin.trainer.packing.choose import Packing
from widemargin.trainer.parallel.groups import Place
from widemargin.trainer.plan.batches import micro_batch
from widemargin.trainer.plan.simulation import Checkpointing, Recipe, simulate

from bench.lib.profile import allocations, recorded_events

SMALL_LM = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
"""The shape of ../shared/data/small_lm."""

LENGTHS = np.array([[120, 200, 150], [60, 90, 310]])
PACKINGS = {
    "padded": Packing("padded", "dense", ""),
    "prefix_shared": Packing("prefix_shared", "varlen", ""),
}


def small_config() -> Any:
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "small_lm"
    if folder.is_dir():
        return AutoConfig.from_pretrained(folder)
    return AutoConfig.for_model(**SMALL_LM)


def estimated_bytes(
    config: Any,
    settings: PreferenceConfig,
    layout: str,
    every: int | None,
    bf16: bool,
    sharing: int = 1,
) -> int:
    """The estimated peak, without gradients and weights, of one of the ranks that share a row.

    Args:
        every: one layer of so many is computed again; none.
    """
    recipe = Recipe(
        config=config,
        settings=settings,
        dtype=torch.float32,
        autocast=torch.bfloat16 if bf16 else None,
        attention="sdpa",
        device="cpu",
        checkpointing=None if every is None else Checkpointing(every, offload=False),
    )
    batch = micro_batch(PairLengths(*LENGTHS.T), PACKINGS[layout])
    return simulate(recipe, batch if sharing == 1 else batch.of_a_rank(sharing)).peak


def measured_bytes(
    config: Any, layout: str, every: int | None, bf16: bool, place: Place | None = None
) -> int:
    """The most that torch's allocator had out during a second forward and backward.

    Weights and the first one's gradients are there before; every gradient goes as soon as it has
    been added to them.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    )
    patch_head(model, place=place)
    if every is not None:
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False}, **({} if every == 1 else {"every_n_layers": every}))
    packing = PACKINGS[layout]
    generator = np.random.default_rng(0)
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: generator.integers(3, 32000, n) for name, n in zip(parts, three, strict=True)}
        for three in LENGTHS
    ]
    batch = PairCollator(2, layout=packing.layout, rows=packing.rows, place=place)(rows)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            out = model(**model_inputs(batch))
        out.token_logps.sum().backward()

    model.train()
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiled:
        step()
    level = peak = 0
    for _, size in allocations(recorded_events(profiled), "cpu"):
        level += size
        peak = max(peak, level)
    return peak


def main() -> None:
    settings = PreferenceConfig(objective="simpo", use_cpu=True, report_to="none")
    config = small_config()
    print("| rows | checkpointing | computes in | estimated MiB | measured MiB | error |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for layout, every, bf16 in itertools.product(PACKINGS, (None, 1), (False, True)):
        case = layout, every, bf16
        estimated = estimated_bytes(config, settings, *case)
        measured = measured_bytes(config, *case)
        print(
            f"| {layout} | {'yes' if every else 'no'} | {'bf16' if bf16 else 'fp32'} | "
            f"{estimated / 2**20:.1f} | {measured / 2**20:.1f} | {estimated / measured - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
