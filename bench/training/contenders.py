"""Who takes part in `bench.training`, and shapes of models with random weights."""

from typing import Any

LAYOUTS = ("padded", "packed", "prefix_shared")
CONTENDERS: dict[str, dict[str, Any]] = {
    **{f"widemargin-{layout}": {"trainer": "ours", "packing": layout} for layout in LAYOUTS},
    "widemargin-trees": {"trainer": "ours", "packing": "prefix_shared", "trees": True},
    "trl-cpo": {"trainer": "trl-cpo"},
    "trl-dpo": {"trainer": "trl-dpo"},
    "trl-dpo-our-head": {"trainer": "trl-dpo", "our_head": True},
}
BASES = ("trl-cpo", "trl-dpo")
"""Against which the others are compared."""


def _llama(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int):
    """A config of Llama's family, in the order in which model cards give the sizes."""
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 32, 48, 2, 4, 2),
    "llama-1b": _llama(128256, 2048, 8192, 16, 32, 8) | {"tie_word_embeddings": True},
    "llama-8b": _llama(128256, 4096, 14336, 32, 32, 8) | {"tie_word_embeddings": False},
}
_DPO = {"trl-dpo", "trl-dpo-our-head"}
SKIPPED = {"simpo": _DPO, "lmpo": _DPO | {"trl-cpo"}, "dpo": {"trl-cpo"}}
"""Contenders that lack the objective."""
TREES = "widemargin-trees"
"""The contender of `--trees`, whose pairs share their prompts."""
