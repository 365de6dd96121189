"""Texts -> token ids, what texts share only once.

A prompt stands in front of both its answers, so plain tokenization does it three times. But a
tokenizer takes its special tokens out of a text first and handles what lies between them piece by
piece: a text cut just before one gives the same tokens as the uncut text. That holds where the
token is looked for in the raw text (not ``normalized``), takes no blanks from its left, and no
other added token can reach over its beginning; `cut_mark` makes sure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .template import bos_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .chat import Rendered

_RARE = "\ue000"
"""A character for private use, in no vocabulary."""


class TripleEncoder:
    """Encodes triples of texts (prompt, prompt with chosen, prompt with rejected) to ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, example_prompt: str | None):
        self.tokenizer = tokenizer
        self.mark = cut_mark(tokenizer, example_prompt) if example_prompt else None

    def __call__(self, triples: Sequence[Rendered]) -> list[tuple[list[int], list[int], list[int]]]:
        cuts = [self._cut(triple) for triple in triples]
        pieces = {
            piece: None
            for triple, cut in zip(triples, cuts, strict=True)
            for piece in (triple[0][:cut], *(text[cut:] for text in triple))
        }
        pieces.pop("", None)
        ids = dict(zip(pieces, encode(self.tokenizer, list(pieces)), strict=True)) | {"": []}
        encoded = []
        for triple, cut in zip(triples, cuts, strict=True):
            head = ids[triple[0][:cut]]
            prompt, chosen, rejected = (head + ids[text[cut:]] for text in triple)
            encoded.append((prompt, chosen, rejected))
        return encoded

    def _cut(self, triple: Rendered) -> int:
        """The end of a triple's shared beginning: the last mark in it."""
        if self.mark is None:
            return 0
        prompt, chosen, rejected = triple
        cut = max(prompt.rfind(self.mark), 0)
        shared = prompt[: cut + len(self.mark)]
        return cut if chosen.startswith(shared) and rejected.startswith(shared) else 0


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without special tokens beyond those written in it.

    With a template that has BOS apart (`bos_apart`), a text's BOS is no part of what follows it.
    """
    if not bos_apart(tokenizer):
        return _encoded(tokenizer, texts)
    bos = str(tokenizer.bos_token)
    heads = [[tokenizer.bos_token_id] if text.startswith(bos) else [] for text in texts]
    ids = _encoded(tokenizer, [text.removeprefix(bos) for text in texts])
    return [[*head, *rest] for head, rest in zip(heads, ids, strict=True)]


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    backend: Any = _plain_backend(tokenizer)
    if backend is None:
        return tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    # What the call above does, less the offsets of each token in the text: a quarter of the time.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The ``tokenizers.Tokenizer`` inside, where calling it is all that the tokenizer does."""
    from transformers import PreTrainedTokenizerFast

    plain = all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name)
        for name in ("__call__", "_encode_plus")
    )
    return tokenizer.backend_tokenizer if plain else None


def cut_mark(tokenizer: PreTrainedTokenizerBase, example_prompt: str) -> str | None:
    """The special token before which prompts like this one can be cut; None for none."""
    if _plain_backend(tokenizer) is None or tokenizer.split_special_tokens:
        return None
    added = list(tokenizer.added_tokens_decoder.values())
    marks = [token for token in added if token.special and token.content in example_prompt]
    if not marks:
        return None
    last = max(marks, key=lambda token: example_prompt.rfind(token.content))
    begins_plainly = not (last.content[0].isalnum() or last.content[0].isspace())
    simple = begins_plainly and not (last.normalized or last.lstrip or last.single_word)
    return last.content if simple and not _reached_over(last.content, added) else None


def _reached_over(mark: str, added: Iterable[Any]) -> bool:
    """Whether an added token that starts before ``mark`` in a text can end inside or after it."""
    return any(
        mark in token.content[1:]
        or any(token.content[1:].endswith(mark[:size]) for size in range(1, len(mark)))
        for token in added
    )


def unknown_id(tokenizer: Any) -> int | None:
    """The token that stands for characters that the tokenizer does not know; None without one."""
    token_id: Any = tokenizer.unk_token_id
    return token_id if token_id in encode(tokenizer, [_RARE])[0] else None


def single_bos(ids: list[int], bos_id: int | None) -> list[int]:
    """``ids`` with one BOS where they begin with several."""
    if bos_id is None:
        return ids
    extra = 0
    while ids[extra : extra + 2] == [bos_id, bos_id]:
        extra += 1
    return ids[extra:]
