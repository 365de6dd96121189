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


_SMALL = {
    "vocab_size": 4096, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {
    "falcon-h1-10m": _SMALL | {
        "model_type": "falcon_h1", "intermediate_size": 512, "num_hidden_layers": 9,
        "mamba_d_ssm": 384, "mamba_n_heads": 6, "mamba_d_head": 64, "mamba_d_state": 128,
        "mamba_chunk_size": 128,
    },
    "qwen3.5-10m": _SMALL | {
        "model_type": "qwen3_5_text", "intermediate_size": 768, "num_hidden_layers": 8,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
}  # fmt: skip
"""Models with recurrent layers, in the proportions of released ones: Mamba-2 beside attention in
every layer, and three layers of gated delta rules to one of attention. The head has a tenth of the
weights, as in models of some billions."""
SHAPES: dict[str, dict[str, Any]] = {
    **HYBRIDS,
    "tiny": _llama(64, 32, 48, 2, 4, 2),
    "llama-1b": _llama(128256, 2048, 8192, 16, 32, 8) | {"tie_word_embeddings": True},
    "llama-8b": _llama(128256, 4096, 14336, 32, 32, 8) | {"tie_word_embeddings": False},
}
_DPO = {"trl-dpo", "trl-dpo-our-head"}
SKIPPED = {"simpo": _DPO, "lmpo": _DPO | {"trl-cpo"}, "dpo": {"trl-cpo"}}
"""Contenders that lack the objective."""
TREES = "widemargin-trees"
"""The contender of `--trees`, whose pairs share their prompts."""
