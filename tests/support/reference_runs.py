"""Short DPO runs, and a reference's log-probs by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from widemargin.kernels import reference as definitions
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.data import tokenize_pairs

from tests.support.tiny_models import TOKENIZER, tiny_config, tiny_model, tiny_pairs

LORA = {"use_peft": True, "lora_dropout": 0.0, "learning_rate": 0.5}
ONCE = {"precompute_ref_log_probs": True}


def dpo_trainer(folder, model=None, ref_model=None, peft_config=None, **settings):
    """A short DPO run over `tiny_pairs`."""
    count, held_out = settings.pop("pairs", 12), settings.pop("eval_pairs", 0)
    return PreferenceTrainer(
        model or tiny_model(),
        tiny_config(folder, **{"objective": "dpo", "beta": 0.5} | settings),
        train_dataset=tiny_pairs(count),
        eval_dataset=tiny_pairs(held_out, seed=1) if held_out else None,
        processing_class=TOKENIZER,
        ref_model=ref_model,
        peft_config=peft_config,
    )


def trained(folder, **settings):
    trainer = dpo_trainer(folder, **settings)
    trainer.train()
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sums_by_hand(model, row) -> list[torch.Tensor]:
    """Summed log-probs of one row's completions, with full logits."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([*row["prompt_ids"], *row[side]])
        n = len(row[side])
        hidden = model.model(ids[None]).last_hidden_state[0, -n - 1 : -1]
        sums.append(definitions.linear_logprob(hidden, model.lm_head.weight, ids[-n:]).sum())
    return sums


def with_columns(names, shift=0.0) -> Dataset:
    pairs, _ = tokenize_pairs(tiny_pairs(), TOKENIZER, tiny_config(Path("unused")))
    model = tiny_model()
    with torch.no_grad():
        sums = np.array([[s.item() for s in sums_by_hand(model, row)] for row in pairs]) + shift
    for name, column in zip(names, sums.T, strict=True):
        pairs = pairs.add_column(name, column)
    return pairs
