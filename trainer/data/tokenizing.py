"""Pairs -> token ids: one prompt and two completions that fit the limits.

The prompt is the longest common token prefix of the rendered prompt (with the generation prompt)
and *both* rendered conversations, so it is right even where tokens merge across its end or the
template writes history differently; such a row is flagged as a prompt mismatch. Each side's
tokens are those of the whole conversation, tokenized at once, as the model meets them later.

A completion ends with the end-of-turn token, where generation stops. What the template writes
after that (a newline after ``<|end|>``, say) is dropped: the model would never be asked for it.

All this is ``chat_rendering: joint``; `separate` has the published scripts' way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import chat, separate
from .columns import TOKEN_COLUMNS
from .encoding import Triple, TripleEncoder
from .limits import (
    BOS_DOUBLED,
    CHOSEN_NO_END,
    FLAGS,
    MISMATCH,
    OK,
    REJECTED_NO_END,
    SEVERAL_TURNS,
    Limits,
    Tokens,
    fit,
)
from .rows import EMPTY_COMPLETION, WRONG_TYPE, Messages, Pair, RowProblem, common_prefix, read_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST_ID = 2**31 - 1
_COLUMNS = (*TOKEN_COLUMNS, "status", "detail", "flags", "max_id")


class PairTokenizer:
    """Batches of raw rows -> the columns of ``_COLUMNS``; travels to worker processes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        rendering: chat.Rendering | None = None,
    ):
        self.tokenizer = tokenizer
        self.limits = limits
        self.rendering = rendering or chat.Rendering()
        self.bos_id = chat.only_id(tokenizer.bos_token_id)
        self.eos_id = chat.only_id(tokenizer.eos_token_id)
        self.text_prefix = chat.plain_text_prefix(tokenizer)
        has_template = bool(tokenizer.chat_template)
        self.end_id = chat.end_of_turn_id(tokenizer) if has_template else None
        self.empty_system = (
            has_template and self.rendering.empty_system and chat.takes_empty_system(tokenizer)
        )
        generation = not self.rendering.separate
        example = chat.example_prompt(tokenizer, generation) if has_template else None
        self.encode = TripleEncoder(tokenizer, example)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        pairs = [_attempt(self._read, row) for row in rows]
        texts = self._texts(pairs)
        ids = iter(self.encode([row for row in texts if not isinstance(row, RowProblem)]))
        return _columns(
            row if isinstance(row, RowProblem) else _attempt(self._finish, pair, *next(ids))
            for pair, row in zip(pairs, texts, strict=True)
        )

    def _read(self, row: dict[str, Any]) -> Pair:
        pair = read_row(row)
        return separate.last_turns(pair, row) if self.rendering.separate else pair

    def _texts(self, pairs: list[Pair | RowProblem]) -> list[Triple | RowProblem]:
        """Prompt, prompt with chosen and prompt with rejected of each pair, as text."""
        chats = [
            (self._opened(pair.prompt), pair.chosen, pair.rejected)
            for pair in pairs
            if isinstance(pair, Pair) and pair.conversation
        ]
        render = separate.render_pairs if self.rendering.separate else render_pairs
        rendered = iter(render(self.tokenizer, chats))
        texts: list[Triple | RowProblem] = []
        for pair in pairs:
            if isinstance(pair, RowProblem):
                texts.append(pair)
            elif pair.conversation:
                texts.append(next(rendered))
            else:
                texts.append((pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected))
        return texts

    def _opened(self, prompt: Messages) -> Messages:
        """The prompt with an empty system message, if it is wanted and lacks one."""
        if not self.empty_system or prompt[0]["role"] == "system":
            return prompt
        return [{"role": "system", "content": ""}, *prompt]

    def _finish(
        self, pair: Pair, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> Tokens:
        if pair.conversation and self.rendering.separate:
            tokens = separate.split(pair, prompt, chosen, rejected, self.bos_id, self.eos_id)
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
    """Batches that hold token ids already -> the columns of ``_COLUMNS``, checked and cut."""

    def __init__(self, limits: Limits, bos_id: int | None):
        self.limits = limits
        self.bos_id = bos_id

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = zip(*(batch[name] for name in TOKEN_COLUMNS), strict=True)
        return _columns(_attempt(self._read, row) for row in rows)

    def _read(self, row: tuple[Any, Any, Any]) -> Tokens:
        for name, ids in zip(TOKEN_COLUMNS, row, strict=True):
            if not isinstance(ids, list) or not all(
                isinstance(i, int) and 0 <= i <= _LARGEST_ID for i in ids
            ):
                raise RowProblem(WRONG_TYPE, f"{name} is not a list of token ids")
        return fit(Tokens(*row, flags=set()), self.limits, self.bos_id)


def render_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[Messages, Messages, Messages]]
) -> list[Triple | RowProblem]:
    """Prompt, prompt with chosen and prompt with rejected of each pair, as text."""
    prompts = chat.render(tokenizer, [prompt for prompt, _, _ in pairs], generation=True)
    chosen, rejected = (
        chat.render(tokenizer, [pair[0] + pair[part] for pair in pairs], generation=False)
        for part in (1, 2)
    )
    texts: list[Triple | RowProblem] = []
    for row in zip(prompts, chosen, rejected, strict=True):
        refused = next((text for text in row if isinstance(text, RowProblem)), None)
        texts.append(refused or (str(row[0]), str(row[1]), str(row[2])))
    return texts


def features() -> Any:
    """The ``datasets.Features`` of the columns a batch becomes."""
    from datasets import Features, List, Value

    types = dict.fromkeys(TOKEN_COLUMNS, List(Value("int32")))
    numbers = {"flags": Value("int32"), "max_id": Value("int64")}
    return Features({**types, "status": Value("string"), "detail": Value("string"), **numbers})


def _columns(outcomes: Iterable[Tokens | RowProblem]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for outcome in outcomes:
        if isinstance(outcome, RowProblem):
            values = ([], [], [], outcome.reason, outcome.detail, 0, -1)
        else:
            sides = (outcome.prompt, outcome.chosen, outcome.rejected)
            flags = sum(1 << i for i, flag in enumerate(FLAGS) if flag in outcome.flags)
            values = (*sides, OK, outcome.detail, flags, max(map(max, sides)))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def _attempt(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except RowProblem as problem:
        return problem
