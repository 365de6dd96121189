"""Tokenization once: kept on disk under a hash of everything the tokens depend on.

The hash covers the raw rows (the data set's own fingerprint), the tokenizer's content and
template, and the limits; never the identity of an object, nor the truncation and padding that a
tokenizer remembers from its last call. So the next run finds the result, and so do the other
processes of this one: they wait for the first on a lock file, not in a collective that times out.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .chat import only_id
from .tokenizing import TOKEN_COLUMNS, Limits, PairTokenizer, TokenizedReader, features

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from .settings import DataSettings

# Raise it when the same rows, tokenizer and limits come to give other tokens or counts.
_VERSION = 1


def cached_map(raw: Dataset, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> Dataset:
    """The rows of ``raw`` tokenized (or, if they hold ids already, checked and cut)."""
    from datasets import config
    from filelock import FileLock

    limits = Limits.of(settings)
    key = fingerprint(raw, tokenizer, limits)
    folder = os.path.join(config.HF_DATASETS_CACHE, "widemargin")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"pairs-{key}.arrow")
    tokenized = set(TOKEN_COLUMNS) <= set(raw.column_names)
    with FileLock(path + ".lock"):
        return raw.map(
            TokenizedReader(limits, only_id(tokenizer.bos_token_id))
            if tokenized
            else PairTokenizer(tokenizer, limits),
            batched=True,
            remove_columns=raw.column_names,
            features=features(),
            num_proc=settings.preprocessing_num_workers,
            new_fingerprint=key,
            cache_file_name=path,
            desc="Tokenizing pairs",
        )


def fingerprint(raw: Dataset, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> str:
    """The hash of all that decides the tokens of ``raw``."""
    import tokenizers
    import transformers
    from datasets.fingerprint import Hasher

    versions = [_VERSION, transformers.__version__, tokenizers.__version__]
    facts = [versions, raw._fingerprint, _tokenizer_content(tokenizer), asdict(limits)]
    return Hasher.hash(json.dumps(facts, sort_keys=True, default=str))


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {
            "vocabulary": tokenizer.get_vocab(),
            "init": tokenizer.init_kwargs,
        }
    else:
        content = json.loads(backend.to_str())
        del content["truncation"], content["padding"]
    return {
        "class": type(tokenizer).__name__,
        "content": content,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "split_special": getattr(tokenizer, "split_special_tokens", None),
    }
