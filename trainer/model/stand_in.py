"""A small model of the same class and config, to try what the model itself cannot.

Weights that DeepSpeed or FSDP splits over ranks cannot be compared with anything, and a long row
through a large model is dear. The stand-in has narrow layers and random weights, and the rest as
the config says: what is done to logits, masks and positions is the family's own code.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

HEADS, HEAD_DIM, LAYERS, VOCABULARY, EXPERTS = 4, 16, 2, 512, 4
WIDTHS = {
    "hidden_size": HEADS * HEAD_DIM,
    "word_embed_proj_dim": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "max_window_layers": 1,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "num_attention_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_head_dim": 2 * HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 8,
    "global_head_dim": HEAD_DIM,
    "num_kv_shared_layers": 0,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96,
}
"""Numbers that a stand-in has, where its config has such a setting."""


def stand_in(model: Any, device: torch.device | str | None = None) -> Any:
    """A small random model with the config of ``model``; None where its family has no small one.

    It computes in fp32, or in half precision where its attention takes nothing else.
    """
    for shrink in (shrunk, _shortened):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                small: Any = built(type(model), shrink(model.config)).to(device or "cpu")
                ids = torch.arange(1, 9, device=small.device)[None]
                with torch.no_grad():
                    logits = small(input_ids=ids, use_cache=False).logits
            except Exception:  # each family fails in its own way at numbers that do not fit
                continue
            if logits.isfinite().all():
                return small
    return None


def built(family: Any, config: Any) -> Any:
    """A model with weights large enough that its logits differ."""
    small = family(config).float()
    small.init_weights()
    for name, parameter in small.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.1)
    half = torch.bfloat16 if "flash" in str(config.get_text_config()._attn_implementation) else None
    return small.eval() if half is None else small.eval().to(half)


def _shortened(config: Any) -> Any:
    """The config with few layers, one of each kind, and few tokens."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = LAYERS
    if kinds:
        unlike = list(dict.fromkeys(kinds))
        text.layer_types = (unlike + list(kinds))[: max(LAYERS, len(unlike))]
        text.num_hidden_layers = len(text.layer_types)
    if text.vocab_size > VOCABULARY:
        text.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(getattr(text, name, None), int):
            setattr(text, name, getattr(text, name) % text.vocab_size)
    return config


def shrunk(config: Any) -> Any:
    """The config with narrow layers too."""
    config = _shortened(config)
    text = config.get_text_config()
    layers, grouped = text.num_hidden_layers, _grouped(text)
    _cut_rope(text)
    for name, value in WIDTHS.items():
        given = _given(text, name)
        if name == "num_hidden_layers" or given is None:
            continue
        listed = isinstance(given, list)
        setattr(text, name, [value] * layers if listed else value)
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = HEADS // 2 if grouped else HEADS
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(text, name, None):
            setattr(text, name, max(EXPERTS, 2 * chosen))
    return config


def _given(text: Any, name: str) -> Any:
    try:
        return getattr(text, name, None)
    except Exception:  # transformers' own for a number that layers do not share
        return None


def _grouped(text: Any) -> bool:
    heads = getattr(text, "num_key_value_heads", None)
    return bool(heads) and heads != getattr(text, "num_attention_heads", None)


def _cut_rope(text: Any) -> None:
    """Lists of one factor a frequency, as LongRoPE has them, are as long as a head is wide."""
    rope = getattr(text, "rope_parameters", None)
    for settings in [rope, *rope.values()] if isinstance(rope, dict) else []:
        for name, values in settings.items() if isinstance(settings, dict) else ():
            if name.endswith("_factor") and isinstance(values, list):
                settings[name] = (values * HEAD_DIM)[: HEAD_DIM // 2]
