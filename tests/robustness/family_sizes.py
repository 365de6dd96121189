"""Sizes of tiny models, for families that name them otherwise than `tiny_models.SHAPE` does."""
# fmt: off

from __future__ import annotations

from typing import Any

from tests.support.tiny_models import SHAPE

_EXPERTS = {"n_routed_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 16}
_LATENT = _EXPERTS | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}
_HYBRID = {"num_hidden_layers": 4, "num_key_value_heads": 4,
           "layer_types": ["linear_attention", "hybrid"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "depth": 1,
           "num_attention_heads": 2, "num_heads": 2, "image_size": 28, "patch_size": 14}
_BYTES = SHAPE | {"num_hidden_layers": 1, "num_key_value_heads": 4, "hidden_size_global": 32,
                  "cross_attn_k": 1}

SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 48, "attention_heads": 4, "num_layers": 2},
    "ctrl": {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 256},
    "falcon": {"new_decoder_architecture": False},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "bamba": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "attn_layer_indices": [1],
    },
    "mixtral": {"num_local_experts": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "whisper": {
        "d_model": 32,
        "decoder_attention_heads": 4,
        "encoder_attention_heads": 4,
        "decoder_layers": 2,
        "encoder_layers": 1,
        "decoder_ffn_dim": 48,
    },
    "plbart": {
        "d_model": 32,
        "decoder_attention_heads": 4,
        "encoder_attention_heads": 4,
        "decoder_layers": 2,
        "encoder_layers": 1,
        "decoder_ffn_dim": 48,
    },
    "zamba": _HYBRID | {"mamba_d_state": 8, "n_mamba_heads": 2, "mamba_dt_rank": 4},
    "zamba2": _HYBRID
    | {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1,
       "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]},
    "deepseek_v2": _LATENT | {"topk_method": "greedy"},
    "dots1": _EXPERTS | {"n_shared_experts": 1},
    "dots3_note_text": _LATENT,
    "kimi_linear": _LATENT | {"linear_head_dim": 8, "linear_num_heads": 4, "head_dim": 16},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "granitemoehybrid": _EXPERTS
    | {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16,
       "mamba_d_state": 8, "shared_intermediate_size": 16},
    "qwen4_exp_text": _EXPERTS,
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "reformer": {"axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 48,
                 "attn_layers": ["local", "lsh"], "num_buckets": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "git": {"vision_config": _VISION},
    "phi4_multimodal": {
        "vision_config": _VISION | {"num_hidden_layers": 2, "crop_size": 28},
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
            "ext_pw_out_channel": 16, "nemo_conv_channels": 16,
        },
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
}
"""Sizes of families that name them otherwise, or need more of them."""

NESTED: dict[str, dict[str, Any]] = {
    **{
        family: {"text_config": SHAPE, "vision_config": _VISION}
        for family in ("llama4", "gemma3", "qwen3_5", "qwen3_5_moe", "got_ocr2")
    },
    "qwen4_exp": {"text_config": SHAPE | _EXPERTS},
    "emu3": {
        "text_config": SHAPE,
        "vq_config": {
            "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "embed_dim": 8,
            "hidden_size": 16, "codebook_size": 16, "attn_resolutions": [1], "latent_channels": 32,
        },
    },
    "moss_transcribe_diarize": {
        "text_config": SHAPE,
        "audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
                         "encoder_ffn_dim": 16, "num_mel_bins": 8},
    },
    "prophetnet": {
        "vocab_size": SHAPE["vocab_size"], "hidden_size": 32, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "num_encoder_layers": 1, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    },
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": SHAPE["vocab_size"],
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "blt": {
        "vocab_size": SHAPE["vocab_size"], "cross_attn_k": 1, "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_nb_functions": 1, "encoder_hash_byte_group_size": [3],
        **{f"{part}_config": _BYTES for part in ("patcher", "encoder", "decoder", "global")},
    },
}
"""Configs of families whose sizes lie in configs of their parts."""
