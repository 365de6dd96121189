"""Models and tokenizers that are only read, and a fingerprint of a model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.template import read_chat_template
from ..errors import UserError, refusals
from ..model.loading import adapted_model, disable_dropout, load_model, load_tokenizer
from ..settings.model import ModelSettings
from .settings import LoadSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16


def device_of(settings: LoadSettings) -> torch.device:
    """Where the model runs."""
    import torch

    if settings.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with refusals(f"device: {settings.device!r} is none", RuntimeError):
        device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: {settings.device} is asked for and there is no CUDA device here")
    return device


def dtype_of(settings: LoadSettings) -> str:
    """The dtype the model computes in."""
    return settings.dtype or ("float32" if device_of(settings).type == "cpu" else "bfloat16")


def read_tokenizer(
    settings: LoadSettings, model: str, template: str | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with ``template`` in place of its chat template if given."""
    tokenizer = load_tokenizer(model_settings(settings, model))
    if template is not None:
        tokenizer.chat_template = read_chat_template(template)
    return tokenizer


def read_model(settings: LoadSettings, model: str) -> PreTrainedModel:
    """The model on its device, in eval mode, without dropout or gradients."""
    loaded: Any = load_model(model_settings(settings, model))
    if hasattr(loaded, "get_base_model"):  # a folder with an adapter alone
        loaded = loaded.merge_and_unload()
    disable_dropout(loaded)
    return loaded.to(device_of(settings)).requires_grad_(False).eval()


def model_settings(settings: LoadSettings, model: str) -> ModelSettings:
    """The settings with which `load_model` loads it."""
    return ModelSettings(
        model_name_or_path=model,
        model_revision=settings.model_revision,
        dtype=dtype_of(settings),
        attn_implementation=settings.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        tokenizer_as_saved=settings.tokenizer_as_saved,
    )


def fingerprint(settings: LoadSettings, model: str) -> str:
    """A hash of samples of the model's files, which more training changes.

    A hub name stands for itself and its revision.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return f"{model}@{settings.model_revision}"
    digest = hashlib.sha256()
    base = adapted_model(model_settings(settings, model), model)
    if base is not None:
        on_base = replace(settings, model_revision=base.model_revision)
        digest.update(fingerprint(on_base, str(base.model_name_or_path)).encode())
    patterns = ("*.safetensors", "*config.json", "tokenizer*", "chat_template*")
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    with refusals(f"model {model}: cannot be read", OSError):
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
