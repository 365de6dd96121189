"""Rows -> token ids: one prompt and two completions that fit the limits.

`PairTokenizer` takes a batch of rows through four steps: `rows` reads each as a pair, `chat`
renders the pair as text, `TripleEncoder` turns the text into ids, and `limits` cuts them. `table`
makes columns of the result.

The prompt is the longest common token prefix of the rendered prompt (with the generation prompt)
and *both* rendered conversations, so it is right even where tokens merge across its end or the
template writes history differently; such a row is flagged as a prompt mismatch. Each side's
tokens are those of the whole conversation, tokenized at once, as the model meets them later.

A completion ends with the end-of-turn token, where generation stops. What the template writes
after that (a newline after ``<|end|>``, say) is dropped: the model would never be asked for it.

All this is ``chat_rendering: joint``; `separate` has the published scripts' way.

A prompt stands in front of both its answers, so plain tokenization does it three times. But a
tokenizer takes its special tokens out of a text first and handles what lies between them piece by
piece: a text cut just before one gives the same tokens as the uncut text. That holds where the
token is looked for in the raw text (not ``normalized``), takes no blanks from its left, and no
other added token can reach over its beginning; `cut_mark` makes sure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .chat import (
    Rendered,
    Rendering,
    end_of_turn_id,
    example_prompt,
    only_id,
    plain_text_prefix,
    render_pairs,
    takes_empty_system,
)
from .limits import (
    BOS_DOUBLED,
    CHOSEN_NO_END,
    MISMATCH,
    REJECTED_NO_END,
    SEVERAL_TURNS,
    Limits,
    Tokens,
    fit,
)
from .rows import EMPTY_COMPLETION, WRONG_TYPE, Messages, Pair, RowProblem, common_prefix, read_row
from .separate import last_turns, render_separately, split_separate
from .table import TOKEN_COLUMNS, token_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST_ID = 2**31 - 1


class PairTokenizer:
    """Batches of raw rows -> columns of tokens; travels to worker processes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        rendering: Rendering | None = None,
    ):
        self.tokenizer = tokenizer
        self.limits = limits
        self.rendering = rendering or Rendering()
        self.bos_id = only_id(tokenizer.bos_token_id)
        self.eos_id = only_id(tokenizer.eos_token_id)
        self.text_prefix = plain_text_prefix(tokenizer)
        has_template = bool(tokenizer.chat_template)
        self.end_id = end_of_turn_id(tokenizer) if has_template else None
        self.empty_system = (
            has_template and self.rendering.empty_system and takes_empty_system(tokenizer)
        )
        generation = not self.rendering.separate
        example = example_prompt(tokenizer, generation) if has_template else None
        self.encode = TripleEncoder(tokenizer, example)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        pairs = [_attempt(self._read, row) for row in rows]
        rendered = self._render(pairs)
        ids = iter(self.encode([texts for texts in rendered if not isinstance(texts, RowProblem)]))
        return token_columns(
            texts if isinstance(texts, RowProblem) else _attempt(self._finish, pair, *next(ids))
            for pair, texts in zip(pairs, rendered, strict=True)
        )

    def _read(self, row: dict[str, Any]) -> Pair:
        pair = read_row(row)
        return last_turns(pair, row) if self.rendering.separate else pair

    def _render(self, pairs: list[Pair | RowProblem]) -> list[Rendered | RowProblem]:
        chats = [
            (self._opened(pair.prompt), pair.chosen, pair.rejected)
            for pair in pairs
            if isinstance(pair, Pair) and pair.conversation
        ]
        render = render_separately if self.rendering.separate else render_pairs
        conversations = iter(render(self.tokenizer, chats))
        rendered: list[Rendered | RowProblem] = []
        for pair in pairs:
            if isinstance(pair, RowProblem):
                rendered.append(pair)
            elif pair.conversation:
                rendered.append(next(conversations))
            else:
                sides = (pair.prompt + side for side in (pair.chosen, pair.rejected))
                rendered.append((pair.prompt, *sides))
        return rendered

    def _opened(self, prompt: Messages) -> Messages:
        """The prompt, with an empty system message where the settings ask for one."""
        if not self.empty_system or prompt[0]["role"] == "system":
            return prompt
        return [{"role": "system", "content": ""}, *prompt]

    def _finish(
        self, pair: Pair, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> Tokens:
        if pair.conversation and self.rendering.separate:
            tokens = split_separate(pair, prompt, chosen, rejected, self.bos_id, self.eos_id)
            return fit(tokens, self.limits, self.bos_id, as_published=True)
        flags = {SEVERAL_TURNS} if pair.several_turns else set()
        if not pair.conversation:
            prompt, chosen, rejected = (
                self.text_prefix + ids for ids in (prompt, chosen, rejected)
            )
        single = [self._single_bos(ids) for ids in (prompt, chosen, rejected)]
        if len(single[0]) < len(prompt):
            flags.add(BOS_DOUBLED)
        prompt, chosen, rejected = single
        shared = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
        detail = ""
        if shared < len(prompt):
            flags.add(MISMATCH)
            detail = f"the last {len(prompt) - shared} of {len(prompt)} prompt tokens are not kept"
        prompt, sides = prompt[:shared], []
        for side, flag in ((chosen[shared:], CHOSEN_NO_END), (rejected[shared:], REJECTED_NO_END)):
            side, ended = self._end(side, pair.conversation)
            sides.append(side)
            if not ended:
                flags.add(flag)
        return fit(Tokens(prompt, sides[0], sides[1], flags, detail), self.limits, self.bos_id)

    def _single_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is None:
            return ids
        extra = 0
        while ids[extra : extra + 2] == [self.bos_id, self.bos_id]:
            extra += 1
        return ids[extra:]

    def _end(self, side: list[int], conversation: bool) -> tuple[list[int], bool]:
        """A completion up to its end token, and whether it has one; plain text is given EOS."""
        end_id = self.end_id if conversation else self.eos_id
        if conversation and end_id in side:
            side = side[: len(side) - side[::-1].index(end_id)]
        elif not conversation and end_id is not None and side[-1:] != [end_id]:
            side = [*side, end_id]
        if not side or side == [end_id]:
            raise RowProblem(EMPTY_COMPLETION, "a completion renders to nothing but its end token")
        return side, side[-1] == end_id


class TokenizedReader:
    """Batches that hold token ids already -> the same columns, checked and cut."""

    def __init__(self, limits: Limits, bos_id: int | None):
        self.limits = limits
        self.bos_id = bos_id

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = zip(*(batch[name] for name in TOKEN_COLUMNS), strict=True)
        return token_columns(_attempt(self._read, row) for row in rows)

    def _read(self, row: tuple[Any, Any, Any]) -> Tokens:
        for name, ids in zip(TOKEN_COLUMNS, row, strict=True):
            if not isinstance(ids, list) or not all(
                isinstance(i, int) and 0 <= i <= _LARGEST_ID for i in ids
            ):
                raise RowProblem(WRONG_TYPE, f"{name} is not a list of token ids")
        return fit(Tokens(*row, flags=set()), self.limits, self.bos_id)


def _attempt(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except RowProblem as problem:
        return problem


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


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without special tokens beyond those written in it."""
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
