"""Who takes part in `bench.training`, and shapes of models with random weights."""

from typing import Any

LAYOUTS = ("padded", "packed", "prefix_shared")
CONTENDERS: dict[str, dict[str, Any]] = {
    **{f"widemargin-{layout}": {"trainer": "ours", "packing": layout} for layout in LAYOUTS},
    "trl-cpo": {"trainer": "trl-cpo"},
    "trl-dpo": {"trainer": "trl-dpo"},
}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": LLAMA
    | {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
SKIPPED = {"simpo": {"trl-dpo"}, "lmpo": {"trl-cpo", "trl-dpo"}, "dpo": {"trl-cpo"}}
"""Contenders that lack the objective."""
