"""What ends an answer, and how long one can be."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data import chat
from ..evaluation.settings import AnswerSettings


def stop_ids(settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase, saved: Any) -> list[int]:
    """The tokens that end an answer.

    Without ``stop_token_ids``: those of ``saved``, the model's own generation config, the
    tokenizer's end of sequence and what the chat template closes an answer with.
    """
    if settings.stop_token_ids is not None:
        return sorted(set(settings.stop_token_ids))
    own = getattr(saved, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    found = [*found, chat.only_id(tokenizer.eos_token_id), chat.end_of_turn_id(tokenizer)]
    return sorted({i for i in found if i is not None})


def context_of(config: Any) -> int | None:
    """The most tokens the model takes, prompt and answer together; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
