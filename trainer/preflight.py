"""What a run would do: its settings, data, first pair and plan; trains nothing."""

from __future__ import annotations

import dataclasses
import os
from contextlib import redirect_stdout
from typing import Any

import torch
from datasets import Dataset

from .batching.run_plan import fit_micro_batches, planner_for, summarise
from .checkpoint.date import settle_date
from .checkpoint.files import choose_checkpoint
from .data import PairData, load_pairs
from .data.first_pair import preflight_lines
from .data.table import PairRows
from .errors import UserError
from .model.loading import load_model_config, load_tokenizer
from .monitor.run_record import changed_settings
from .objectives import Objective
from .packing.choose import choose_packing
from .settings.checks import check_output, uses_deepspeed
from .settings.config import PreferenceConfig, check_evaluation
from .text import colours


def preflight(config: PreferenceConfig) -> None:
    """Print the settings in effect, what becomes of the data and the first pair; train nothing."""
    if config.process_index > 0:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            _preflight(config)
    else:
        _preflight(config)


def _preflight(config: PreferenceConfig) -> None:
    objective = config.build_objective()
    check_output(config)
    checkpoint = choose_checkpoint(  # by the sizes of its files; training hashes them
        config.resume_from_checkpoint, config.output_dir, hashes=False
    )
    tokenizer = load_tokenizer(config)
    settle_date(config, tokenizer)
    model_config = load_model_config(config).get_text_config()
    data = load_pairs(config, tokenizer, model_config.vocab_size)
    saved_dtype = str(model_config.dtype).removeprefix("torch.")
    dtype = saved_dtype if config.dtype == "auto" else config.dtype
    data.report.notes += weight_notes(config, dtype)
    print("Settings that differ from their defaults")
    for name, value in changed_settings(config).items():
        print(f"  {name}: {value}")
    print(f"\nObjective {objective.name}: {objective.spec.formula}")
    for name, value in dataclasses.asdict(objective.hyperparameters).items():
        print(f"  {name}: {value}")
    if data.train is not None:
        print("\n" + "\n".join(_plan_lines(config, objective, data.train, model_config)))
    if checkpoint is not None:
        print(f"Would go on from {checkpoint}")
    print("\nData")
    print("\n".join(data.report.lines()))
    if data.train is not None:
        print("\nFirst pair")
        print("\n".join(preflight_lines(data.train[0], tokenizer, colours=colours())))
    check_training_data(data)
    check_evaluation(config, data.evaluation)


def _plan_lines(
    config: PreferenceConfig, objective: Objective, pairs: Dataset, model_config: Any
) -> list[str]:
    """The packing that these settings should get, and the plan of the first epoch."""
    lengths = PairRows(pairs).lengths
    packing = choose_packing(
        config.packing,
        model_config,
        attention=config.attn_implementation,
        device=config.device,
        dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32,
        lengths=lengths,
        pairs_per_batch=config.per_device_train_batch_size,
    )
    planner = planner_for(config, lengths, packing.layout, coupled=objective.couples_pairs)
    return [str(packing), *summarise(fit_micro_batches(config, objective, planner)).lines()]


def check_training_data(data: PairData) -> None:
    """Raise ``UserError`` where no split is for training."""
    if data.train is None:
        raise UserError("dataset_splits: none of them is for training; name a train split")


def weight_notes(config: PreferenceConfig, dtype: str) -> list[str]:
    """A remark where the optimizer's small steps would vanish in the weights' rounding.

    DeepSpeed keeps weights in fp32 beside those that compute, whatever their dtype, and peft keeps
    an adapter's.
    """
    notes = []
    precision = config.mixed_precision
    if precision != "no" and not (config.bf16 or config.fp16):
        notes.append(f"computes in {precision}, as the launcher's mixed_precision says")
    if config.use_peft or uses_deepspeed(config) or dtype not in ("bfloat16", "float16"):
        return notes
    return [
        *notes,
        f"the weights are updated in {dtype}, where steps of the usual learning rates (1e-6) are "
        "mostly rounded away; set dtype: float32, and bf16: true to compute in bfloat16",
    ]
