"""Ranks that share rows, each against one process; what they found, in ``FOLDER/RANK.json``.

torchrun --nproc_per_node=2 -m tests.support.shared_row_ranks models FOLDER
torchrun --nproc_per_node=4 -m tests.support.shared_row_ranks runs FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import PrinterCallback
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.model.experts import token_weights
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.objectives import build_objective
from widemargin.trainer.packing import PairCollator, model_inputs
from widemargin.trainer.parallel.groups import Place

from tests.support.packed_rows import EXPERTS, FAMILIES, token_pairs
from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": FAMILIES["llama"],
    "qwen2": FAMILIES["qwen2"],
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "mixtral": ("mixtral", EXPERTS),
}
"""Fewer heads of keys than of queries; a window; fewer than ranks; experts and their loss."""

LAYOUTS = ("packed", "prefix_shared")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "simpo": {},
    "dpo": {"ld_alpha": 0.5},
    "lmpo": {"sft_weight": 0.5, "nll": "prompt_and_answer"},
}
"""Means; sums with a reference, of weighted tokens; pairs that are coupled, and prompts scored."""

RUNS: dict[str, dict[str, Any]] = {
    "lmpo": {
        "objective": "lmpo", "packing": "prefix_shared", "token_metrics": True,
        "eval_strategy": "steps", "eval_steps": 3,
        "save_strategy": "steps", "save_steps": 2,
    },
    "dpo": {
        "objective": "dpo", "packing": "packed", "precompute_ref_log_probs": True,
        "gradient_checkpointing": True,
    },
    "kto": {
        "objective": "kto", "use_peft": True, "lora_r": 2, "lora_dropout": 0.0,
        "learning_rate": 0.5, "group_by_prompt": True, "max_prompt_length": 4,
        "truncation_mode": "keep_start",
    },
    "kto-labels": {"objective": "kto", "objective_args": {"kl_estimate": "mismatched"}},
}  # fmt: skip
"""With evaluation, checkpoints and metrics of tokens; a kept reference; an adapter, and trees;
single answers, also after other prompts."""


def loss_and_gradient(
    model: Any, batch: dict[str, Any], name: str, place: Place | None
) -> tuple[Tensor, Tensor]:
    """A micro-batch's loss and all gradients of it in one vector, averaged over the ranks."""
    patch_head(model, tail="exact", place=place)
    objective = build_objective(name, beta=0.5, **OBJECTIVES[name])
    model.zero_grad()
    weights = {"router_weights": token_weights(batch)} if "experts" in str(model) else {}
    scored = model(**model_inputs(batch), **weights)
    references = torch.linspace(-30, -10, len(batch["cu_seqlens"]) - 1)
    prompts = {key: batch[key] for key in ("prompt_cu_seqlens", "prompts") if key in batch}
    loss = objective(scored.token_logps, batch["cu_seqlens"], references, **prompts).loss
    if scored.aux_loss is not None:
        loss = loss + scored.aux_loss
    loss.backward()
    every = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.detach(), every if place is None else place.averaged(every)


def alone(name: str, checkpointing: bool) -> dict[str, list[Any]]:
    """What one process has for all batches, before any process meets another."""
    found = {}
    for key, batch in batches(None).items():
        model = model_of(name, checkpointing)
        found[key] = loss_and_gradient(model, batch, key.split()[1], None)
    return found


def model_of(name: str, checkpointing: bool) -> Any:
    family, changes = MODELS[name]
    model: Any = tiny_model(family, **changes)
    model.config._attn_implementation = "sdpa"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def batches(place: Place | None) -> dict[str, dict[str, Any]]:
    """A batch of every layout for every objective, and one whose targets a single rank has."""
    collator = PairCollator(0, layout="prefix_shared", rows="varlen", place=place)
    short = {"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9]}
    found = {"short simpo": collator([short])}
    for layout in LAYOUTS:
        for name, given in OBJECTIVES.items():
            collator = PairCollator(0, layout=layout, rows="varlen", place=place)
            collator.scores_prompts = "nll" in given
            found[f"{layout} {name}"] = collator(token_pairs(4, seed=3))
    return found


def models(rank: int) -> dict[str, Any]:
    """Largest errors of loss and gradient, by model and batch."""
    cases = [(name, name == "llama") for name in MODELS]
    expected = {name: alone(name, checkpointing) for name, checkpointing in cases}
    dist.init_process_group("gloo")
    place, errors = Place(rank, 2), {}
    for name, checkpointing in cases:
        for key, batch in batches(place).items():
            model = model_of(name, checkpointing)
            loss, gradient = loss_and_gradient(model, batch, key.split()[1], place)
            one_loss, one = expected[name][key]
            apart = ((gradient - one).norm() / one.norm()).item()
            errors[f"{name} {key}"] = [(loss - one_loss).abs().item(), apart]
    tokens = {key: batch["input_ids"].numel() for key, batch in batches(None).items()}
    targets = len(batches(place)["short simpo"]["own_targets"])
    return {"errors": errors, "tokens": tokens, "targets": targets}


def run(name: str, folder: Path, ranks: int, resume: str | None = None) -> None:
    """Train; the first rank leaves the weights and the log in ``folder``."""
    model: Any = tiny_model()
    model.config._attn_implementation = "sdpa"
    sharing = {"sequence_parallel_size": 2, "ddp_backend": "gloo"} if ranks > 1 else {}
    given = {"per_device_train_batch_size": 8 // max(2, ranks), "max_steps": 5}
    rows = tiny_pairs(9)  # the epoch's last step has one, so that a group has a filler
    trainer = PreferenceTrainer(
        model,
        tiny_config(folder, **given, **RUNS[name], **sharing),
        labelled(rows) if name == "kto-labels" else rows,
        tiny_pairs(5, seed=1) if "eval_strategy" in RUNS[name] else None,
        processing_class=TOKENIZER,
        compute_metrics=lambda found: {"rows": float(len(found.label_ids))},
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.args.process_index == 0:
        trained: Any = trainer.accelerator.unwrap_model(trainer.model)
        weights = {key: value.detach().clone() for key, value in trained.named_parameters()}
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "weights")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def labelled(pairs: Dataset) -> Dataset:
    """Single answers, every other one desirable."""
    sides = ("chosen", "rejected")
    answers = [(row["prompt"], row[sides[i % 2]], i % 2 == 0) for i, row in enumerate(pairs)]
    return Dataset.from_list(
        [dict(zip(("prompt", "completion", "label"), each, strict=True)) for each in answers]
    )


def main(what: str, folder: Path) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if what == "models":
        (folder / f"{rank}.json").write_text(json.dumps(models(rank)))
    else:
        for name in RUNS:
            run(name, folder / f"{ranks}-{name}", ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
