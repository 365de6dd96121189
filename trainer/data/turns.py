"""Turns of a conversation: the tokens that end one, and which tokens of an answer are scored.

An answer of one turn is scored up to the first token that ends it. In an answer of several turns
the positions of each assistant turn are found by prefixes: a turn begins where the conversation
before it, with the generation prompt, stops to be the beginning of the whole one, and ends with its
end token. So headers, user and tool messages are never scored. A template's ``{% generation %}``
marks narrow that down further.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from .chat import PROBE, generation_mask, only_id, render
from .encoder import encode, single_bos
from .limits import AFTER_END, NO_TURNS, NOT_SCORED
from .rows import EMPTY_COMPLETION, Messages, Pair, RowProblem, common_prefix

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

_SOME = 16
UNCLEAR_TURNS = "turns that the template does not keep apart"

THINK_MARKS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)


@dataclass(frozen=True)
class Ends:
    """Tokens that end an assistant turn.

    ``answer`` is what the template writes after a last answer, None for nothing; at ``stops``
    generation stops; ``history`` is what the template writes after an earlier answer.
    """

    answer: int | None = None
    stops: frozenset[int] = frozenset()
    history: frozenset[int] = frozenset()


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int] = ()) -> int | None:
    """The token the chat template closes an answer with, where generation stops; None without one.

    ``stops`` are the model's own, of its generation config.
    """
    return find_ends(tokenizer, stops).answer


def find_ends(tokenizer: PreTrainedTokenizerBase, stops: Iterable[int] = ()) -> Ends:
    """The tokens that end a turn, by what the template writes after a probe.

    What it writes after every answer goes before what it writes at the end of a conversation alone
    (Phi-3's ``<|endoftext|>``), a token that stops generation before another special one (Cohere's
    ``<|END_RESPONSE|>``), and that before an added token that is not blank.
    """
    eos = only_id(tokenizer.eos_token_id)
    stopping = {*stops} | ({eos} if eos is not None else set())
    ask, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
    last, amid = render(tokenizer, [[ask, answer], [ask, answer, ask]], generation=False)
    after = _after_probe(tokenizer, last)
    if after is None:
        return Ends(eos, frozenset(stopping))
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special}
    history = _after_probe(tokenizer, amid)
    always = after if history is None else after[: common_prefix(after, history)]
    named = {i for i, token in added.items() if token.content.strip()}
    kinds = [(ids, kind) for ids in (always, after) for kind in (stopping, special)]
    found = (i for ids, kind in [*kinds, (after, named)] for i in ids if i in kind)
    closing = [i for i in history or [] if i in special][:1]
    end = next(found, None)
    return Ends(
        end, frozenset({*stops} | ({end} if end is not None else set())), frozenset(closing)
    )


def _after_probe(tokenizer: PreTrainedTokenizerBase, text: str | RowProblem) -> list[int] | None:
    if isinstance(text, RowProblem) or PROBE not in text:
        return None
    return encode(tokenizer, [text.rpartition(PROBE)[2]])[0]


@dataclass
class Side:
    """One answer as ids: those to keep, the positions among them not scored, and flags."""

    ids: list[int]
    unscored: list[int] = field(default_factory=list)
    ended: bool = True
    flags: set[str] = field(default_factory=set)


class TurnScorer:
    """Cuts an answer at its end, and says which of its tokens are scored."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ends: Ends,
        score: str = "completion",
        text_prefix: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.ends = ends
        self.score = score
        self.text_prefix = list(text_prefix)
        self.bos_id = only_id(tokenizer.bos_token_id)
        self.eos_id = only_id(tokenizer.eos_token_id)
        self.added = frozenset(tokenizer.added_tokens_decoder)

    def side(
        self, pair: Pair, answer: Any, prompt: str, text: str, ids: list[int], start: int
    ) -> Side:
        """The ``answer`` of a pair, which begins at ``start``.

        ``ids`` are those of ``text``, which begins with ``prompt``.
        """
        if not pair.conversation:
            return self._plain(prompt, text, ids, start)
        return self._conversation(pair, answer, prompt, text, ids, start)

    def _plain(self, prompt: str, text: str, ids: list[int], start: int) -> Side:
        """An answer of plain text, closed with EOS unless an end stands there already."""
        closing = {self.eos_id, self.ends.answer} - {None}
        side, kept = ids[start:], len(ids) - start
        while kept and not self._says(side[kept - 1 : kept], special=True):
            kept -= 1
        if kept and side[kept - 1] in closing:
            side = side[:kept]
        elif self.eos_id is not None:
            side = [*side, self.eos_id]
        if not side or side == [self.eos_id]:
            raise RowProblem(EMPTY_COMPLETION, "a completion renders to nothing but its end token")
        keep = [True] * (start + len(side))
        self._leave_reasoning_out(keep, prompt, text, ids, self.text_prefix)
        flags = {NO_TURNS} if self.score in ("last_turn", "all_assistant") else set()
        return self._side(ids[:start] + side, keep, start, side[-1] in closing, flags)

    def _conversation(
        self, pair: Pair, answer: Messages, prompt: str, text: str, ids: list[int], start: int
    ) -> Side:
        messages, first, given = pair.prompt + answer, len(pair.prompt), pair.arguments
        answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        told = bool(answers) and answers[0] > first  # what tools said goes before the first answer
        begin = self._begin(messages, answers[0], ids, given) if told else start
        end = _first(ids, self.ends.stops, begin)
        if not self._says(ids[begin:end], special=True):
            raise RowProblem(EMPTY_COMPLETION, "a completion renders to nothing but its end token")
        if not answers:
            roles = ", ".join(dict.fromkeys(str(m["role"]) for m in messages[first:]))
            raise RowProblem(NOT_SCORED, f"its messages have the role {roles}, not assistant")
        keep = [False] * len(ids)
        begins = [begin, *(self._begin(messages, i, ids, given) for i in answers[1:]), len(ids)]
        cut = start
        for i, begin, limit in zip(answers, begins, begins[1:], strict=False):
            cut = self._end(messages, i, ids, begin, limit, given)
            if self.score != "last_turn" or i == answers[-1]:
                keep[begin:cut] = [True] * (cut - begin)
        over = answers[-1] == len(messages) - 1 and self._says(ids[cut:])
        if self.score != "completion" or len(answers) > 1:
            closing = self.ends.stops | self.ends.history
            marks = generation_mask(self.tokenizer, messages, ids, given)
            for i, marked in enumerate(marks or ()):
                keep[i] = keep[i] and (marked or ids[i] in closing)
        self._leave_reasoning_out(keep, prompt, text, ids)
        ended = ids[cut - 1] in self.ends.stops
        return self._side(ids[:cut], keep, start, ended, {AFTER_END} if over else set())

    def _side(
        self, ids: list[int], keep: list[bool], start: int, ended: bool, flags: set[str]
    ) -> Side:
        unscored = [i - start for i in range(start, len(ids)) if not keep[i]]
        if len(unscored) == len(ids) - start:
            raise RowProblem(NOT_SCORED, f"score: {self.score} leaves none of its tokens")
        return Side(ids[start:], unscored, ended, flags)

    def _begin(self, messages: Messages, i: int, ids: list[int], given: Mapping[str, Any]) -> int:
        """Where the turn of message ``i`` begins in ``ids``."""
        before = self._rendered(messages[:i], True, given)
        if isinstance(before, RowProblem):
            raise RowProblem(UNCLEAR_TURNS, f"before message {i}: {before.detail}")
        return common_prefix(before, ids)

    def _end(
        self,
        messages: Messages,
        i: int,
        ids: list[int],
        begin: int,
        limit: int,
        given: Mapping[str, Any],
    ) -> int:
        """Where the turn of message ``i``, which begins at ``begin``, ends: after its end token."""
        if i == len(messages) - 1:
            return min(_first(ids, self.ends.stops, begin) + 1, len(ids))
        after = self._rendered(messages[: i + 1], False, given)
        after = [] if isinstance(after, RowProblem) else after
        shared = common_prefix(after, ids)
        stop = max(shared, begin)
        closed = [p for p in range(begin, stop) if ids[p] in self.ends.stops][:1]
        if not closed and begin < stop == len(after):
            return stop
        closing = self.ends.stops | self.ends.history
        closed = closed or [p for p in range(stop, limit) if ids[p] in closing][:1]
        if not closed and (closing or stop == begin):
            raise RowProblem(UNCLEAR_TURNS, f"the end of message {i} cannot be found")
        return closed[0] + 1 if closed else stop

    def _leave_reasoning_out(
        self, keep: list[bool], prompt: str, text: str, ids: list[int], prefix: Sequence[int] = ()
    ) -> None:
        if self.score != "answer":
            return
        for begin, end in reasoning(text, common_prefix(prompt, text)):
            first, last = (
                common_prefix(self._encode(text[:place], prefix), ids) for place in (begin, end)
            )
            keep[first:last] = [False] * (last - first)

    def _rendered(self, messages: Messages, generation: bool, given: Mapping[str, Any]) -> Any:
        text = render(self.tokenizer, [messages], generation, given)[0]
        return text if isinstance(text, RowProblem) else self._encode(text)

    def _encode(self, text: str, prefix: Sequence[int] = ()) -> list[int]:
        return single_bos([*prefix, *encode(self.tokenizer, [text])[0]], self.bos_id)

    def _says(self, ids: Sequence[int], special: bool = False) -> bool:
        """Whether ids are more than blanks and (unless they count) special tokens."""
        rest = iter(ids) if special else (i for i in ids if i not in self.added)
        while some := list(islice(rest, _SOME)):  # the first few tell nearly always
            if str(self.tokenizer.decode(some)).strip():
                return True
        return False


def _first(ids: list[int], tokens: Iterable[int], start: int) -> int:
    """Where the first of ``tokens`` stands in ``ids`` from ``start`` on; its length for nowhere."""
    place = len(ids)
    for token in tokens:
        with suppress(ValueError):
            place = ids.index(token, start, place)
    return place


def reasoning(text: str, start: int) -> Iterator[tuple[int, int]]:
    """The spans of ``text`` from ``start`` on that think marks enclose, marks and blanks included.

    A prompt may have opened the first, and then only its end is seen.
    """
    for opening, closing in THINK_MARKS:
        before = text[:start]
        opened = before.rfind(opening) > before.rfind(closing)
        where = before.rfind(opening) if opened else start
        if opening not in text[start:] and "hink" in closing.lower():
            opened = opened or closing in text[start:]
        while opened or text.find(opening, where) >= 0:
            begin = where if opened else text.find(opening, where)
            end = text.find(closing, max(begin, start))
            if end < 0:
                yield begin, len(text)
                break
            where = end + len(closing)
            where += len(text[where:]) - len(text[where:].lstrip())
            yield begin, where
            opened = False
