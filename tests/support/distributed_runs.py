"""Short training runs that any number of processes must end in the same parameters.

As a module under a launcher it does all runs of one engine, one after another:

    accelerate launch --config_file configs/accelerate/ENGINE.yaml \
        -m tests.support.distributed_runs ENGINE FOLDER

Each leaves its model, its loss curve and every rank's target margins under ``FOLDER/ENGINE/RUN``.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PrinterCallback, TrainerCallback
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.errors import UserError
from widemargin.trainer.settings.launch import leave_group

from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs

STEPS = 10
UNTIED, TIED = "untied", "tied"
PAIRS = {UNTIED: 21, TIED: 17}
"""Steps of 8 pairs in 2 global micro-batches; the epoch's last has 5 pairs (the ranks get 2 and 1,
then 1 and 1), or a single one, so that one rank has a filler."""

LORA = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.0, "learning_rate": 0.1}
TREES = {"group_by_prompt": True, "max_prompt_length": 4, "truncation_mode": "keep_start"}
"""Prompts cut so short that several pairs have the same one."""

RUNS: dict[str, dict[str, Any]] = {
    "simpo": {"model": UNTIED, "objective": "simpo", "packing": "padded"},
    "simpo-tied": {"model": TIED, "objective": "simpo", "packing": "prefix_shared"},
    "lmpo": {"model": UNTIED, "objective": "lmpo", "packing": "prefix_shared"},
    "lmpo-tied": {"model": TIED, "objective": "lmpo", "packing": "packed"},
    "gamma-simpo": {"model": UNTIED, "objective": "gamma-simpo", "packing": "packed"},
    "gamma-simpo-tied": {"model": TIED, "objective": "gamma-simpo", "packing": "prefix_shared"},
    "dpo": {"model": UNTIED, "objective": "dpo", "packing": "padded", "beta": 0.5},
    "dpo-tied": {
        "model": TIED, "objective": "dpo", "packing": "prefix_shared", "beta": 0.5,
        "ref_model_name_or_path": "reference",
    },
    "dpo-precomputed": {
        "model": UNTIED, "objective": "dpo", "packing": "packed", "beta": 0.5,
        "precompute_ref_log_probs": True,
    },
    "dpo-lora": {
        "model": TIED, "objective": "dpo", "packing": "packed", "beta": 0.5,
        "merge_adapter": True, **LORA,
    },
    "lmpo-trees": {"model": UNTIED, "objective": "lmpo", "packing": "prefix_shared", **TREES},
    "dpo-trees": {
        "model": TIED, "objective": "dpo", "packing": "packed", "beta": 0.5,
        "precompute_ref_log_probs": True, **TREES,
    },
    "dpo-shared-rows": {
        "model": TIED, "objective": "dpo", "packing": "prefix_shared", "beta": 0.5,
        "ref_model_name_or_path": "reference", "gradient_checkpointing": True,
        "sequence_parallel_size": 2,
    },
    "checkpointing": {
        "model": UNTIED, "objective": "lmpo", "packing": "padded", "gradient_checkpointing": True,
    },
}  # fmt: skip
OFFLOADED = ("lmpo", "dpo-tied", "dpo-lora")
RESUMED: dict[str, Any] = {
    "model": UNTIED, "objective": "lmpo", "packing": "padded", "optim": "adamw_torch",
    "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "max_steps": 4,
    "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip
"""Run twice, the second time from the first one's checkpoint in the middle."""

SPOILT_STEP = 3


class Noting(PreferenceTrainer):
    """Notes the target margins of this rank's pairs, by step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.margins: list[dict[int, float]] = [{} for _ in range(self.args.max_steps)]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(
            model, inputs, True, num_items_in_batch=kwargs["num_items_in_batch"]
        )
        margins = outputs["pairs"].target_margins.tolist()
        ids = inputs["pair_ids"].tolist()
        noted = {i: m for i, m in zip(ids, margins, strict=True) if i >= 0}
        self.margins[self.state.global_step] |= noted
        return loss


class Spoilt(Noting):
    """Meets with a loss or a gradient that is not finite, in one step of the last rank."""

    what = ""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        last = self.args.process_index == self.args.world_size - 1
        if last and self.state.global_step + 1 == SPOILT_STEP:
            if self.what == "loss":
                ids = inputs["pair_ids"]
                self.nonfinite_guard.saw(
                    ids, torch.full(ids.shape, torch.nan), torch.tensor(torch.nan)
                )
            else:
                loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss


class Keeping(TrainerCallback):
    """Keeps the parameters as they are before the spoilt step."""

    weights: dict[str, torch.Tensor]

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == SPOILT_STEP:
            self.weights = weights_in_training(self.trainer)


def write_inputs(folder: Path) -> None:
    """The models that the runs name."""
    models = {
        UNTIED: tiny_model(),
        TIED: tiny_model(tie_word_embeddings=True),
        "reference": tiny_model(seed=1, tie_word_embeddings=True),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)


def trainer_of(
    settings: dict[str, Any], inputs: Path, output: Path, kind: type[Noting] = Noting
) -> Noting:
    """The trainer of a run on this process's share of the ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": 2, **settings}
    settings["sequence_parallel_size"] = min(ranks, settings.get("sequence_parallel_size", 1))
    groups = ranks // settings["sequence_parallel_size"]
    if ranks > 1:
        settings |= {"ddp_backend": "gloo", "ddp_timeout": 120}
    if "ref_model_name_or_path" in settings:
        settings["ref_model_name_or_path"] = str(inputs / settings["ref_model_name_or_path"])
    model = settings.pop("model")
    config = tiny_config(output, per_device_train_batch_size=4 // groups, **settings)
    trainer = kind(str(inputs / model), config, tiny_pairs(PAIRS[model]))
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(settings: dict[str, Any], inputs: Path, output: Path, resume: Any = None) -> Noting:
    """Train, and write the model, the losses and this rank's margins to ``output``."""
    trainer = trainer_of(settings, inputs, output)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    rank = trainer.args.process_index
    output.mkdir(parents=True, exist_ok=True)
    (output / f"margins-{rank}.json").write_text(json.dumps(trainer.margins))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (output / f"losses-{rank}.json").write_text(json.dumps(losses))
    return trainer


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """The parameters as they are in training, whole, on all ranks."""
    from contextlib import nullcontext

    whole = nullcontext()
    parameters = dict(model.named_parameters())
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed  # pyright: ignore[reportMissingImports] (an extra)

        whole = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with whole:
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for name, p in parameters.items()
        }


def weights_in_training(trainer: Any) -> dict[str, torch.Tensor]:
    return gathered(trainer.accelerator.unwrap_model(trainer.model))


def spoil(what: str, inputs: Path, output: Path) -> None:
    """A run stopped at a step that is not finite: its message, its weights before and after."""
    trainer = trainer_of(RUNS["simpo"], inputs, output, Spoilt)
    trainer.what = what  # pyright: ignore[reportAttributeAccessIssue]
    keeping = Keeping(trainer)
    trainer.add_callback(keeping)
    try:
        trainer.train()
        message = "not stopped"
    except UserError as error:
        message = str(error)
    after = weights_in_training(trainer)
    if trainer.args.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        save_file(keeping.weights, output / "before.safetensors")
        save_file(after, output / "after.safetensors")
        (output / "message.txt").write_text(message)


def take_the_cpu_for_an_accelerator() -> None:
    """accelerate offers FSDP on accelerators only; to its state, let this be one."""
    import accelerate.state as state

    kinds: Any = state.DistributedType

    class Kinds:
        def __getattr__(self, name: str) -> Any:
            return kinds.MULTI_CPU if name == "MULTI_NEURON" else getattr(kinds, name)

    state.DistributedType = Kinds()  # pyright: ignore


def leave_collectives_to_gloo() -> None:
    """DeepSpeed would compile its own for a CPU, which takes a compiler and minutes."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None


def main(engine: str, folder: Path) -> None:
    """All runs of an engine, in this process as one of its ranks."""
    if engine == "fsdp2":
        take_the_cpu_for_an_accelerator()
    if engine.startswith("deepspeed"):
        leave_collectives_to_gloo()
    output = folder / engine
    wanted = OFFLOADED if engine.endswith("offload") else RUNS
    for name in wanted:
        trainer = run(RUNS[name], folder, output / name)
        if name in OFFLOADED:
            weights = weights_in_training(trainer)
            if trainer.args.process_index == 0:
                save_file(weights, output / name / "in_training.safetensors")
    if engine.endswith("offload"):
        return
    run(RESUMED, folder, output / "uninterrupted")
    checkpoint = output / "uninterrupted" / "checkpoint-2"
    run(RESUMED, folder, output / "resumed", str(checkpoint))
    for what in ("loss", "gradient"):
        spoil(what, folder, output / f"spoilt-{what}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main(sys.argv[1], Path(sys.argv[2]))
    leave_group()
