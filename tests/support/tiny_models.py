"""Tiny models of real families, pairs for them, and short training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from widemargin.trainer import PreferenceConfig, PreferenceTrainer

from tests.support.tiny_tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCABULARY = len(TOKENIZER)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A randomly initialised fp32 model, big enough weights that logits differ."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SHAPE | {"initializer_range": 0.2} | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()


def tiny_pairs(count: int = 12, seed: int = 0) -> Dataset:
    """Pairs of unequal lengths, as text."""
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> str:
        n = int(torch.randint(1, most, (), generator=generator))
        picked = torch.randint(0, 5, (n,), generator=generator).tolist()
        return " ".join(["yes", "no", "maybe", "water", "Paris"][i] for i in picked)

    rows = [
        {
            "prompt": f"User: {words(6)} Assistant:",
            "chosen": f" {words(5)}.",
            "rejected": f" {words(9)}",
        }
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def tiny_config(folder: Path, **settings: Any) -> PreferenceConfig:
    """A short SGD run on the CPU; every setting can be given another value."""
    defaults: dict[str, Any] = {
        "objective": "simpo",
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 64,
        "max_prompt_length": 32,
        "head_tail": "exact",
    }
    return PreferenceConfig(**defaults | settings)


def tiny_trainer(
    folder: Path, model: PreTrainedModel | None = None, **settings: Any
) -> PreferenceTrainer:
    """A trainer over `tiny_pairs`; ``pairs`` and ``eval_pairs`` say how many."""
    count, held_out = settings.pop("pairs", 12), settings.pop("eval_pairs", 0)
    return PreferenceTrainer(
        model or tiny_model(),
        tiny_config(folder, **settings),
        train_dataset=tiny_pairs(count),
        eval_dataset=tiny_pairs(held_out, seed=1) if held_out else None,
        processing_class=TOKENIZER,
    )


def parameters_of(model: torch.nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
