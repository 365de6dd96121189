"""The model that would train, from its config alone: shape, parameters, operations; no weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, refusals
from ..files import read_json
from ..model.adapters import lora_config, with_adapter
from ..monitor.metrics import decoder_weights, flops_per_token
from ..settings.config import PreferenceConfig

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
MISTRAL_7B = LLAMA_3_8B | {
    "model_type": "mistral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}
QWEN_2_5_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3_8B,
    "princeton-nlp/Llama-3-Base-8B-SFT": LLAMA_3_8B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B | {"sliding_window": 4096},
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL_7B | {"sliding_window": 4096},
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL_7B,
    "google/gemma-2-9b": GEMMA_2_9B,
    "google/gemma-2-9b-it": GEMMA_2_9B,
    "Qwen/Qwen2.5-7B": QWEN_2_5_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN_2_5_7B,
}
"""Shapes of the models that the shipped configs name, for estimates without the hub."""


@dataclass(frozen=True)
class ModelSize:
    """Counts of elements; under an adapter the model itself is frozen."""

    layers: int
    layer: int  # of the largest decoder layer
    embedding: int
    head: int  # the embedding's own where they are tied
    tied: bool
    trainable: int
    frozen: int
    quantizable: int  # of the frozen ones: linear layers' weights but the head's
    decoder_flops: float  # per token, forward and backward, without attention and recomputation
    decoder_weights: float  # that multiply each token
    hidden_size: int
    vocab_size: int
    attention_width: int  # features of all query heads together

    @property
    def total(self) -> int:
        return self.trainable + self.frozen


def find_config(settings: PreferenceConfig, path: Path | None) -> tuple[Any, str]:
    """The model's config and where it is from.

    Args:
        path: a config.json or a folder with one, in place of what the settings name.

    Raises:
        UserError: there is none on this machine.
    """
    name = settings.model_name_or_path
    if path is None and not name:
        raise UserError("model_name_or_path: none is given; set it, or give --model-config FILE")
    local = path or Path(str(name)).expanduser()
    file = local / "config.json" if local.is_dir() else local
    if file.is_file():
        return _read(file), str(file)
    if path is not None:
        raise UserError(f"--model-config {path}: no such file, or no config.json in the folder")
    if name in PUBLISHED:
        return _of(dict(PUBLISHED[name])), f"the shape of {name} as shipped here"
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(name), local_files_only=True), f"{name}, downloaded"
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model {name}: its config is not on this machine; give --model-config with its "
            f"config.json (shapes shipped here: {', '.join(PUBLISHED)})"
        ) from error


def _read(file: Path) -> Any:
    with refusals(f"model config {file}: not JSON", ValueError, OSError):
        values = read_json(file)
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise UserError(f"model config {file}: expected a model's config.json with its model_type")
    return _of(values)


def _of(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    kind = values.pop("model_type")
    with refusals(f"model config: {kind}", Exception):  # of any family's checks
        config = AutoConfig.for_model(kind, **_numbers(values)).get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"model config: give one of a model with attention; a {kind} reads one token after the "
            "other, and its memory is known only by running it"
        )
    return config


def _numbers(value: Any) -> Any:
    """With ``{"__float__": "Infinity"}`` as the number, for which transformers writes it."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _numbers(part) for key, part in value.items()}
    return [_numbers(part) for part in value] if isinstance(value, list) else value


def with_layers(config: Any, count: int) -> Any:
    """The config with fewer layers; lists that speak of each layer are cut."""
    config = copy.deepcopy(config)
    layers = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, value[:count])
    config.num_hidden_layers = count
    return config


def build(config: Any, attention: str, dtype: torch.dtype) -> Any:
    """The bare causal language model on the current (meta or fake) device; see `adapted`."""
    from transformers import AutoModelForCausalLM

    with refusals(f"model {config.model_type}", ValueError, ImportError, KeyError, TypeError):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )


def attention_of(config: Any) -> str:
    """The implementation that transformers takes where the settings name none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "eager" if kind and not kind._supports_sdpa else "sdpa"


def adapted(model: Any, settings: PreferenceConfig) -> Any:
    """The model in the adapter that the settings ask for; itself without one."""
    lora = lora_config(settings)
    return model if lora is None else with_adapter(model, lora)


def model_size(config: Any, settings: PreferenceConfig) -> ModelSize:
    """Exact counts, from a model whose parameters have shapes and no data."""
    with torch.device("meta"):
        bare = build(config, "eager", torch.float32)
        model = adapted(bare, settings)
    head, embedding = bare.get_output_embeddings().weight, bare.get_input_embeddings().weight
    sizes = {id(p): (p.numel(), p.requires_grad) for p in model.parameters()}
    linear = [m.weight for m in bare.modules() if isinstance(m, torch.nn.Linear)]
    quantizable = {id(w): w.numel() for w in linear if not w.requires_grad and w is not head}
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(
        layers=config.num_hidden_layers,
        layer=_largest_layer(bare, config.num_hidden_layers),
        embedding=embedding.numel(),
        head=head.numel(),
        tied=head is embedding,
        trainable=sum(count for count, trains in sizes.values() if trains),
        frozen=sum(count for count, trains in sizes.values() if not trains),
        quantizable=sum(quantizable.values()),
        decoder_flops=flops_per_token(model)[0],
        decoder_weights=sum(share * p.numel() for p, share in decoder_weights(model)),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        attention_width=heads * width,
    )


def _largest_layer(model: Any, layers: int) -> int:
    """Elements of the decoder's largest layer; a layer's share of all where there is no list."""
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return max(sum(p.numel() for p in layer.parameters()) for layer in module)
    return math.ceil(sum(p.numel() for p in model.get_decoder().parameters()) / layers)
