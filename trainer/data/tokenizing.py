"""Pairs -> token ids: one prompt and two completions that fit the limits.

The prompt is the longest common token prefix of the rendered prompt (with the generation prompt)
and *both* rendered conversations, so it is right even where tokens merge across its end or the
template writes history differently; such a row is flagged as a prompt mismatch. Each side's
tokens are those of the whole conversation, tokenized at once, as the model meets them later.

A completion ends with the end-of-turn token, where generation stops. What the template writes
after that (a newline after ``<|end|>``, say) is dropped: the model would never be asked for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import chat
from .rows import EMPTY_COMPLETION, IDENTICAL, WRONG_TYPE, Pair, RowProblem, common_prefix, read_row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .settings import DataSettings

OK = "ok"
NO_PROMPT_TOKEN = "no prompt token to predict the completion from"
NOTHING_LEFT = "nothing left of a completion after truncation"
IDENTICAL_CUT = "identical sides after truncation"

MISMATCH = "prompt mismatch"
PROMPT_CUT = "prompt truncated"
CHOSEN_CUT = "chosen truncated"
REJECTED_CUT = "rejected truncated"
CHOSEN_NO_END = "chosen without end-of-turn token"
REJECTED_NO_END = "rejected without end-of-turn token"
BOS_DOUBLED = "doubled BOS dropped"
SEVERAL_TURNS = "completion of several turns"
#: What can be said of a row that trains; bit i of the ``flags`` column is FLAGS[i].
FLAGS = (
    MISMATCH,
    PROMPT_CUT,
    CHOSEN_CUT,
    REJECTED_CUT,
    CHOSEN_NO_END,
    REJECTED_NO_END,
    BOS_DOUBLED,
    SEVERAL_TURNS,
)

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_LARGEST_ID = 2**31 - 1
_COLUMNS = (*TOKEN_COLUMNS, "status", "detail", "flags", "max_id")


@dataclass(frozen=True)
class Limits:
    """The settings that decide which tokens of a pair stay."""

    max_length: int | None
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation_mode: str

    @classmethod
    def of(cls, settings: DataSettings) -> Limits:
        return cls(
            settings.max_length,
            settings.max_prompt_length,
            settings.max_completion_length,
            settings.truncation_mode,
        )

    def cut_prompt(self, prompt: list[int], bos_id: int | None) -> list[int]:
        """The prompt within its limit: the side ``truncation_mode`` names, and its BOS."""
        limit = self.max_prompt_length
        if limit is None or len(prompt) <= limit:
            return prompt
        head = prompt[:1] if prompt[0] == bos_id else []
        room = limit - len(head)
        if self.truncation_mode == "keep_end":
            return head + prompt[len(prompt) - room :]
        return prompt[:limit]

    def completion_room(self, prompt_tokens: int) -> int | None:
        """Most tokens of a completion after such a prompt; None for no limit."""
        rooms = [] if self.max_completion_length is None else [self.max_completion_length]
        if self.max_length is not None:
            rooms.append(self.max_length - prompt_tokens)
        return min(rooms, default=None)


@dataclass
class _Tokens:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    flags: set[str]
    detail: str = ""


class PairTokenizer:
    """Batches of raw rows -> the columns of ``_COLUMNS``; travels to worker processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: Limits):
        self.tokenizer = tokenizer
        self.limits = limits
        self.bos_id = chat.only_id(tokenizer.bos_token_id)
        self.eos_id = chat.only_id(tokenizer.eos_token_id)
        self.text_prefix = chat.plain_text_prefix(tokenizer)
        self.end_id = chat.end_of_turn_id(tokenizer) if tokenizer.chat_template else None

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [
            dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)
        ]
        pairs = [_attempt(read_row, row) for row in rows]
        texts = self._texts(pairs)
        good = [row for row in texts if not isinstance(row, RowProblem)]
        ids = iter(self._encode([text for row in good for text in row]))
        return _columns(
            row
            if isinstance(row, RowProblem)
            else _attempt(self._finish, pair, next(ids), next(ids), next(ids))
            for pair, row in zip(pairs, texts, strict=True)
        )

    def _texts(self, pairs: list[Pair | RowProblem]) -> list[tuple[str, str, str] | RowProblem]:
        """Prompt, prompt with chosen and prompt with rejected of each pair, as text."""
        chats = [pair for pair in pairs if isinstance(pair, Pair) and pair.conversation]
        prompts = chat.render(self.tokenizer, [pair.prompt for pair in chats], True)
        chosen = chat.render(self.tokenizer, [p.prompt + p.chosen for p in chats], False)
        rejected = chat.render(self.tokenizer, [p.prompt + p.rejected for p in chats], False)
        rendered = zip(prompts, chosen, rejected, strict=True)
        texts: list[Any] = []
        for pair in pairs:
            if isinstance(pair, RowProblem):
                texts.append(pair)
            elif pair.conversation:
                row = next(rendered)
                texts.append(next((text for text in row if isinstance(text, RowProblem)), row))
            else:
                texts.append((pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected))
        return texts

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _finish(
        self, pair: Pair, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> _Tokens:
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
        return fit(_Tokens(prompt, sides[0], sides[1], flags, detail), self.limits, self.bos_id)

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

    def _read(self, row: tuple[Any, Any, Any]) -> _Tokens:
        for name, ids in zip(TOKEN_COLUMNS, row, strict=True):
            if not isinstance(ids, list) or not all(
                isinstance(i, int) and 0 <= i <= _LARGEST_ID for i in ids
            ):
                raise RowProblem(WRONG_TYPE, f"{name} is not a list of token ids")
        return fit(_Tokens(*row, flags=set()), self.limits, self.bos_id)


def fit(tokens: _Tokens, limits: Limits, bos_id: int | None) -> _Tokens:
    """Cut a pair to its limits; raise ``RowProblem`` for one that cannot train."""
    if not tokens.prompt:
        raise RowProblem(NO_PROMPT_TOKEN, "the prompt is empty, and no BOS stands before it")
    if not tokens.chosen or not tokens.rejected:
        raise RowProblem(EMPTY_COMPLETION, "a completion has no tokens")
    if tokens.chosen == tokens.rejected:
        raise RowProblem(IDENTICAL, "chosen and rejected have the same tokens")
    prompt = limits.cut_prompt(tokens.prompt, bos_id)
    flags = tokens.flags | ({PROMPT_CUT} if len(prompt) < len(tokens.prompt) else set())
    room = limits.completion_room(len(prompt))
    if room is None:
        return _Tokens(prompt, tokens.chosen, tokens.rejected, flags, tokens.detail)
    if room <= 0:
        raise RowProblem(NOTHING_LEFT, f"the prompt takes {len(prompt)} tokens")
    flags |= {CHOSEN_CUT} if len(tokens.chosen) > room else set()
    flags |= {REJECTED_CUT} if len(tokens.rejected) > room else set()
    chosen, rejected = tokens.chosen[:room], tokens.rejected[:room]
    if chosen == rejected:
        raise RowProblem(IDENTICAL_CUT, f"the sides differ only after {room} tokens")
    return _Tokens(prompt, chosen, rejected, flags, tokens.detail)


def features() -> Any:
    """The ``datasets.Features`` of the columns a batch becomes."""
    from datasets import Features, List, Value

    types = dict.fromkeys(TOKEN_COLUMNS, List(Value("int32")))
    numbers = {"flags": Value("int32"), "max_id": Value("int64")}
    return Features({**types, "status": Value("string"), "detail": Value("string"), **numbers})


def _columns(outcomes: Iterable[_Tokens | RowProblem]) -> dict[str, list[Any]]:
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
