"""What the tests of `widemargin plan` share: settings, a tiny model's config, a published run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from widemargin.trainer import PreferenceConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LMPO = str(CONFIGS / "train" / "lmpo-llama3-8b-instruct.yaml")
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
PARAMETERS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "google/gemma-2-9b-it": 9_241_705_984,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}
"""Of published models, as their authors count them."""


def settings(**given: Any) -> PreferenceConfig:
    return PreferenceConfig(objective="simpo", use_cpu=True, report_to="none", **given)
