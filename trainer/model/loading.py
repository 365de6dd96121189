"""Loading the model and tokenizer that a config names, with errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, refusals
from ..settings.model import ModelSettings
from .adapters import quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(settings: ModelSettings, name: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (end-of-sequence where it has none).

    ``name`` is a folder or hub name in place of the settings'.
    """
    from transformers import AutoTokenizer

    name = name or settings.tokenizer_name_or_path or _model_name(settings)
    tokenizer = _load(AutoTokenizer, name, settings, "tokenizer")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {name}: it has neither a padding nor an end token; add one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: ModelSettings, name: str | None = None) -> PreTrainedModel:
    """The causal language model with its weights, safetensors only.

    ``name`` is a folder or hub name in place of the settings'. Quantized if they say so.
    """
    from transformers import AutoModelForCausalLM

    computes = "bfloat16" if getattr(settings, "bf16", False) else settings.dtype
    quantization = quantization_config(settings, "float32" if computes == "auto" else computes)
    return _load(
        AutoModelForCausalLM,
        name or _model_name(settings),
        settings,
        "model",
        dtype=settings.dtype,
        attn_implementation=settings.attn_implementation,
        use_safetensors=True,
        **({} if quantization is None else {"quantization_config": quantization}),
    )


def load_model_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's config alone, without its weights."""
    from transformers import AutoConfig

    return _load(AutoConfig, _model_name(settings), settings, "model")


def disable_dropout(model: PreTrainedModel) -> None:
    """Set the probability of every dropout layer, and of attention's dropout, to zero."""
    from torch import nn

    modules: Any = model.modules()  # families name their attributes differently
    for module in modules:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the model's embedding, known also where ZeRO-3 has split the weight."""
    return model.config.get_text_config().vocab_size


def _model_name(settings: ModelSettings) -> str:
    if not settings.model_name_or_path:
        raise UserError("model_name_or_path: none is given; set it to a folder or a hub name")
    return settings.model_name_or_path


def _load(loader: Any, name: str, settings: ModelSettings, what: str, **options: Any) -> Any:
    """``from_pretrained``; whatever goes wrong becomes one line."""
    path = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.expanduser().is_dir():
        raise UserError(f"{what} {name}: no such folder")
    if path.is_dir() and not (path / "config.json").is_file() and what == "model":
        raise UserError(f"model {name}: the folder has no config.json; give a saved model's folder")
    with refusals(f"{what} {name}: cannot be loaded", OSError, ValueError, ImportError, KeyError):
        try:
            return loader.from_pretrained(
                str(path.expanduser()) if looks_local else name,
                revision=settings.model_revision if name == settings.model_name_or_path else "main",
                trust_remote_code=settings.trust_remote_code,
                **options,
            )
        except ValueError as error:
            if "trust_remote_code=True" not in str(error):
                raise
            raise UserError(
                f"{what} {name}: it comes with Python code of its own, which does not run unless "
                "you set trust_remote_code: true; read that code first"
            ) from error
