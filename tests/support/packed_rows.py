"""Pairs as token ids, tiny models of the families, and what each sequence gives alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.packing import model_inputs

from tests.support.tiny_models import VOCABULARY, tiny_model

Rows = list[dict[str, Any]]

EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma2": (
        "gemma2",
        {"sliding_window": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}),
}
"""The families that must hold with every attention implementation, windows of 8 and softcaps on."""

RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"sliding_window": 8, **EXPERTS}),
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 16, **EXPERTS}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8}),
    "granite": ("granite", {}),
    "cohere2": ("cohere2", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "smollm3": ("smollm3", {}),
    "ministral": (
        "ministral",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}

MIXTURE = EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "falcon_mamba": ("falcon_mamba", {}),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    ),
    "jamba": (
        "jamba",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, **EXPERTS},
    ),
    "bamba": ("bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "zamba2": (
        "zamba2",
        {
            "num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2,
            "hybrid_layer_ids": [1, 3], "mamba_d_state": 8, "mamba_headdim": 8,
            "n_mamba_heads": 8, "num_key_value_heads": 4,
        },
    ),
    "falcon_h1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 32, "mamba_d_head": 8}),
    "granitemoehybrid": (
        "granitemoehybrid",
        MAMBA | {"layer_types": ["mamba", "attention"], **EXPERTS},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "lfm2_moe",
        {**MIXTURE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    ),
    "qwen3_next": ("qwen3_next", DELTA | MIXTURE),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", DELTA | MIXTURE),
    "olmo_hybrid": ("olmo_hybrid", DELTA),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
            "ssm_state_size": 8, "n_groups": 2,
        },
    ),
    "kimi_linear": (
        "kimi_linear",
        {
            **MIXTURE, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
            "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8, "v_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4,
        },
    ),
}  # fmt: skip
"""Families with recurrent layers, most of them beside attention."""


def token_pairs(count: int = 4, seed: int = 0, longest: int = 24) -> Rows:
    """Pairs of random tokens; prompts of 2 and more, completions of 1 and more."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int) -> list[int]:
        length = int(torch.randint(least, longest, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    names = {"prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
    return [{name: tokens(least) for name, least in names.items()} for _ in range(count)]


def family_model(family: str, attention: str = "eager") -> Any:
    """A tiny model whose attention is set by name alone: also what this machine cannot load."""
    name, changes = (FAMILIES | RELATIVES | RECURRENT)[family]
    model: Any = tiny_model(name, **changes)
    model.config._attn_implementation = attention
    return model


def alone(model: Any, rows: Rows) -> Tensor:
    """Log-probs of every completion token, each sequence in a forward of its own."""
    parts = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            tokens = torch.tensor([[*row["prompt_ids"], *row[side]]])
            begin = len(row["prompt_ids"])
            logits = model(input_ids=tokens, use_cache=False).logits[0, begin - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(1, tokens[0, begin:, None])[:, 0])
    return torch.cat(parts)


def gradient(model: Any, logps: Tensor) -> Tensor:
    """All gradients in one vector, of log-probs with random weights that follow their count."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(5)
    logps.backward(torch.randn(logps.shape, generator=generator))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@cache
def expected(family: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probs and gradient of `token_pairs` alone, by eager attention; computed once."""
    model = family_model(family)
    logps = alone(model, token_pairs(seed=seed))
    return logps.detach(), gradient(model, logps)


def errors(
    model: Any,
    batch: dict[str, Any],
    expected: tuple[Tensor, Tensor],
    *,
    checkpointing: bool = False,
) -> tuple[float, float]:
    """Largest difference of a log-prob from ``expected``, and the gradient's, relatively."""
    patch_head(model, tail="exact")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    logps = model(**model_inputs(batch)).token_logps
    apart = gradient(model, logps) - expected[1]
    relative = apart.norm() / expected[1].norm()
    return (logps - expected[0]).abs().max().item(), relative.item()
