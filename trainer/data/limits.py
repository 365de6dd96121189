"""The tokens of a pair: how many stay within the limits, and the flags that describe them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from .formats.answers import DESIRABLE
from .rows import EMPTY_COMPLETION, IDENTICAL, RowProblem

if TYPE_CHECKING:
    from ..settings.data import DataSettings

OK = "ok"
NO_PROMPT_TOKEN = "no prompt token to predict the completion from"
NOTHING_LEFT = "nothing left of a completion after truncation"
IMAGES_CUT = "a prompt with images over the limits, which none is cut to"
NOT_SCORED = "nothing of an answer is scored"
IDENTICAL_CUT = "identical sides after truncation"

MISMATCH = "prompt mismatch"
PROMPT_CUT = "prompt truncated"
CHOSEN_CUT = "chosen truncated"
REJECTED_CUT = "rejected truncated"
CHOSEN_NO_END = "chosen without end-of-turn token"
REJECTED_NO_END = "rejected without end-of-turn token"
BOS_DOUBLED = "doubled BOS dropped"
SEVERAL_TURNS = "completion of several turns"
AFTER_END = "text after the end-of-turn token left out"
NO_TURNS = "plain text, scored as one turn"
TEXT_LOST = "text left out by the chat template"
UNKNOWN = "characters that the tokenizer does not know"
SCORES_SWAPPED = "chosen with a lower score than rejected"
PROMPT_TWICE = "answers that begin with the text of their prompt, which stands before them too"
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
    AFTER_END,
    NO_TURNS,
    TEXT_LOST,
    UNKNOWN,
    PROMPT_TWICE,
    SCORES_SWAPPED,
)


@dataclass
class Tokens:
    """One pair's token ids, and which of ``FLAGS`` are true of it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    flags: set[str]
    detail: str = ""
    #: Positions in ``chosen`` and in ``rejected`` that are read, but not scored.
    unscored: tuple[list[int], list[int]] = ([], [])
    #: What the row says of the pair, by column: `formats.answers.NUMBER_COLUMNS`.
    numbers: dict[str, float] = field(default_factory=dict)
    #: The images whose tokens are among the prompt's.
    images: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """The settings that decide which tokens of a pair stay."""

    max_length: int | None
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation_mode: str

    @classmethod
    def of(cls, settings: DataSettings) -> Limits:
        return cls(**{each.name: getattr(settings, each.name) for each in fields(cls)})

    def cut(self, tokens: Tokens, bos_id: int | None) -> tuple[list[int], int | None]:
        """The prompt within its limit (BOS stays), and the room it leaves for a completion."""
        prompt, limit = tokens.prompt, self.max_prompt_length
        if limit is not None and len(prompt) > limit:
            head = prompt[:1] if prompt[0] == bos_id else []
            room = limit - len(head)
            keep_end = self.truncation_mode == "keep_end"
            prompt = head + prompt[len(prompt) - room :] if keep_end else prompt[:limit]
        return prompt, self._room(self.max_length, len(prompt))

    def published_cut(self, tokens: Tokens) -> tuple[list[int], int | None]:
        """The same as SimPO's trainer does it.

        A prompt is cut only where it and the longer answer pass ``max_length`` (BOS goes with the
        cut), answers only if they still do, and then as if the prompt had its full length.
        """
        prompt, limit = tokens.prompt, self.max_prompt_length
        longer = max(len(tokens.chosen), len(tokens.rejected))
        if self.max_length is None or len(prompt) + longer <= self.max_length:
            return prompt, self.max_completion_length
        if limit is not None:
            prompt = prompt[-limit:] if self.truncation_mode == "keep_end" else prompt[:limit]
            if len(prompt) + longer <= self.max_length:
                return prompt, self.max_completion_length
        return prompt, self._room(self.max_length, len(prompt) if limit is None else limit)

    def _room(self, longest: int | None, prompt: int) -> int | None:
        """Most tokens of a completion after ``prompt`` tokens; None for no limit."""
        rooms = [] if self.max_completion_length is None else [self.max_completion_length]
        return min(rooms if longest is None else [*rooms, longest - prompt], default=None)


def fit(
    tokens: Tokens, limits: Limits, bos_id: int | None, *, as_published: bool = False
) -> Tokens:
    """Cut a pair to its limits; raise ``RowProblem`` for one that cannot train."""
    if not tokens.prompt:
        raise RowProblem(
            NO_PROMPT_TOKEN,
            "the prompt is empty or grows together with the answer, and no BOS stands before it",
        )
    if not tokens.chosen or not tokens.rejected:
        raise RowProblem(EMPTY_COMPLETION, "a completion has no tokens")
    alike = DESIRABLE in tokens.numbers
    if tokens.chosen == tokens.rejected and not alike:
        raise RowProblem(IDENTICAL, "chosen and rejected have the same tokens")
    prompt, room = limits.published_cut(tokens) if as_published else limits.cut(tokens, bos_id)
    flags = tokens.flags | ({PROMPT_CUT} if len(prompt) < len(tokens.prompt) else set())
    if tokens.images and PROMPT_CUT in flags:
        raise RowProblem(IMAGES_CUT, f"of {len(tokens.prompt)} tokens, its images' included")
    if room is None:
        return replace(tokens, prompt=prompt, flags=flags)
    if room <= 0:
        raise RowProblem(NOTHING_LEFT, f"the prompt takes {len(prompt)} tokens")
    flags |= {CHOSEN_CUT} if len(tokens.chosen) > room else set()
    flags |= {REJECTED_CUT} if len(tokens.rejected) > room else set()
    chosen, rejected = tokens.chosen[:room], tokens.rejected[:room]
    if chosen == rejected and not alike:
        raise RowProblem(IDENTICAL_CUT, f"the sides differ only after {room} tokens")
    unscored = tuple([i for i in side if i < room] for side in tokens.unscored)
    if any(len(ids) == len(left) for ids, left in zip((chosen, rejected), unscored, strict=True)):
        raise RowProblem(NOT_SCORED, f"what is scored comes after {room} tokens")
    return replace(
        tokens,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        flags=flags,
        unscored=(unscored[0], unscored[1]),
    )
