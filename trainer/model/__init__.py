"""The model: loading it, the head without logits inside it, adapters, generation, merging.

May import the kernels, settings, data, packing and batching. Start in `head`.
"""

from .loading import (
    disable_dropout,
    load_model,
    load_model_config,
    load_tokenizer,
    vocabulary_size,
)

__all__ = [
    "disable_dropout",
    "load_model",
    "load_model_config",
    "load_tokenizer",
    "vocabulary_size",
]
