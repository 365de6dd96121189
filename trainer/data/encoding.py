"""Rows -> token ids: one prompt and two completions that fit the limits.

`PairTokenizer` takes a batch of rows through four steps: `rows` reads each as a pair, `chat`
renders the pair as text, `encoder` turns the text into ids, and `limits` cuts them. `table`
makes columns of the result.

The prompt is the longest common token prefix of the rendered prompt (with the generation prompt)
and *both* rendered conversations, so it is right even where tokens merge across its end or the
template writes history differently; such a row is flagged as a prompt mismatch. Each side's
tokens are those of the whole conversation, tokenized at once, as the model meets them later.

A completion ends with the end-of-turn token, where generation stops. What the template writes
after that (a newline after ``<|end|>``, say) is dropped: the model would never be asked for it.
`turns` finds that token, and what of a completion of several turns is scored.

All this is ``chat_rendering: joint``; `separate` has the published scripts' way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .chat import (
    Rendered,
    Rendering,
    example_prompt,
    only_id,
    plain_text_prefix,
    render_pairs,
    takes_empty_system,
)
from .encoder import TripleEncoder, single_bos, unknown_id
from .formats.answers import DESIRABLE, NUMBER_COLUMNS, SCORES, Edges
from .formats.shapes import standard_rows
from .guard import ANSWER_LOST, check_text
from .images.columns import show_images
from .limits import (
    BOS_DOUBLED,
    CHOSEN_NO_END,
    MISMATCH,
    NOT_SCORED,
    PROMPT_TWICE,
    REJECTED_CUT,
    REJECTED_NO_END,
    SCORES_SWAPPED,
    SEVERAL_TURNS,
    TEXT_LOST,
    UNKNOWN,
    Limits,
    Tokens,
    fit,
)
from .rows import (
    EMPTY_COMPLETION,
    WRONG_TYPE,
    Pair,
    RowProblem,
    alike_in_arguments,
    attempt,
    common_prefix,
    dressed,
    numbers_of,
    read_row,
)
from .separate import last_turns, render_separately, split_separate
from .table import TOKEN_COLUMNS, UNSCORED_COLUMNS, token_columns
from .template import content_forms
from .turns import Ends, TurnScorer, find_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .images.processor import ImageProcessor

_LARGEST_ID = 2**31 - 1


class PairTokenizer:
    """Batches of raw rows -> columns of tokens; travels to worker processes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        rendering: Rendering | None = None,
        stops: frozenset[int] = frozenset(),
        edges: Edges | None = None,
        images: ImageProcessor | None = None,
    ):
        self.tokenizer = tokenizer
        self.images = images
        self.limits = limits
        self.edges = edges or Edges()
        self.rendering = rendering or Rendering()
        self.bos_id = only_id(tokenizer.bos_token_id)
        self.eos_id = only_id(tokenizer.eos_token_id)
        self.unknown = unknown_id(tokenizer)
        self.text_prefix = plain_text_prefix(tokenizer)
        has_template = bool(tokenizer.chat_template)
        ends = find_ends(tokenizer, stops) if has_template else Ends()
        self.turns = TurnScorer(tokenizer, ends, self.rendering.score, self.text_prefix)
        self.empty_system = (
            has_template and self.rendering.empty_system and takes_empty_system(tokenizer)
        )
        self.forms = content_forms(tokenizer) if has_template else {}
        self.template = str(tokenizer.chat_template or "")
        generation = not self.rendering.separate
        example = example_prompt(tokenizer, generation) if has_template else None
        self.encode = TripleEncoder(tokenizer, example)

    def __call__(
        self, batch: dict[str, list[Any]], indices: list[int] | None = None
    ) -> dict[str, list[Any]]:
        """Columns of the pairs of these rows, each with its row's number in ``indices``."""
        origins, pairs = [], []
        for place, values in enumerate(zip(*batch.values(), strict=True)):
            made = self._pairs(dict(zip(batch, values, strict=True)))
            origins += [place if indices is None else indices[place]] * len(made)
            pairs += made
        rendered = [
            texts if isinstance(texts, RowProblem) else attempt(self._checked, pair, texts)
            for pair, texts in zip(pairs, self._render(pairs), strict=True)
        ]
        ids = iter(self.encode([texts for texts in rendered if not isinstance(texts, RowProblem)]))
        made = (
            texts
            if isinstance(texts, RowProblem)
            else attempt(self._finish, pair, texts, next(ids))
            for pair, texts in zip(pairs, rendered, strict=True)
        )
        return token_columns(made, images=self.images is not None) | {"row": origins}

    def _pairs(self, row: dict[str, Any]) -> list[Pair | RowProblem]:
        """The pairs of a row, which may have several answers."""
        numbers = attempt(numbers_of, row)
        made = attempt(standard_rows, row, self.edges)
        if problem := next((it for it in (made, numbers) if isinstance(it, RowProblem)), None):
            return [problem]
        return [attempt(self._read, numbers | each) for each in made]

    def _read(self, row: dict[str, Any]) -> Pair:
        pair = read_row(row)
        pair.numbers = numbers_of(row)
        show_images(pair, row)
        if self.rendering.separate:
            pair = last_turns(pair, row)
        if not pair.conversation:
            return pair
        if self.rendering.score == "all_assistant":
            pair = from_first_answer(pair)
        if self.empty_system and pair.prompt[0]["role"] != "system":
            pair.prompt = [{"role": "system", "content": ""}, *pair.prompt]
        return dressed(pair, row, self.rendering.arguments, self.forms)

    def _render(self, pairs: list[Pair | RowProblem]) -> list[Rendered | RowProblem]:
        render_alike = render_separately if self.rendering.separate else render_pairs
        conversations: dict[int, Rendered | RowProblem] = {}
        for alike in alike_in_arguments(pairs):
            texts = render_alike(self.tokenizer, alike)
            conversations.update(zip(map(id, alike), texts, strict=True))
        rendered: list[Rendered | RowProblem] = []
        for pair in pairs:
            if isinstance(pair, RowProblem):
                rendered.append(pair)
            elif pair.conversation:
                rendered.append(conversations[id(pair)])
            else:
                sides = (pair.prompt + side for side in (pair.chosen, pair.rejected))
                rendered.append((pair.prompt, *sides))
        return rendered

    def _checked(self, pair: Pair, texts: Rendered) -> Rendered:
        check_text(pair, texts, self.template)
        return texts if self.images is None else self.images.expanded(texts, pair.images)

    def _finish(
        self, pair: Pair, texts: Rendered, ids: tuple[list[int], list[int], list[int]]
    ) -> Tokens:
        try:
            tokens = self._cut(pair, texts, *ids)
        except RowProblem as problem:
            if problem.reason == EMPTY_COMPLETION and pair.lost:
                raise RowProblem(ANSWER_LOST, pair.lost) from None
            raise
        if DESIRABLE in tokens.numbers:  # its sides are one answer
            tokens.flags -= {REJECTED_NO_END, REJECTED_CUT}
        chosen, rejected = (pair.numbers.get(name, float("nan")) for name in SCORES)
        if chosen < rejected:
            tokens.flags.add(SCORES_SWAPPED)
        if self.unknown is not None and any(self.unknown in part for part in ids):
            tokens.flags.add(UNKNOWN)
        if pair.lost:
            tokens.flags.add(TEXT_LOST)
            tokens.detail = pair.lost
        return tokens

    def _cut(
        self,
        pair: Pair,
        texts: Rendered,
        prompt: list[int],
        chosen: list[int],
        rejected: list[int],
    ) -> Tokens:
        if pair.conversation and self.rendering.separate:
            tokens = split_separate(pair, prompt, chosen, rejected, self.bos_id, self.eos_id)
            tokens.numbers = pair.numbers
            return fit(tokens, self.limits, self.bos_id, as_published=True)
        flags = {SEVERAL_TURNS} if pair.several_turns else set()
        if not pair.conversation:
            flags |= {PROMPT_TWICE} if _repeats_prompt(pair) else set()
            prompt, chosen, rejected = (
                self.text_prefix + ids for ids in (prompt, chosen, rejected)
            )
        single = [single_bos(ids, self.bos_id) for ids in (prompt, chosen, rejected)]
        if len(single[0]) < len(prompt):
            flags.add(BOS_DOUBLED)
        prompt, chosen, rejected = single
        shared = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
        detail = ""
        if shared < len(prompt):
            flags.add(MISMATCH)
            detail = f"the last {len(prompt) - shared} of {len(prompt)} prompt tokens are not kept"
        sides = [
            self.turns.side(pair, answer, texts[0], text, ids, shared)
            for answer, text, ids in zip(
                (pair.chosen, pair.rejected), texts[1:], (chosen, rejected), strict=True
            )
        ]
        for side, flag in zip(sides, (CHOSEN_NO_END, REJECTED_NO_END), strict=True):
            flags |= side.flags | (set() if side.ended else {flag})
        first, second = sides
        unscored = (first.unscored, second.unscored)
        sides = (first.ids, second.ids)
        tokens = Tokens(prompt[:shared], *sides, flags, detail, unscored, pair.numbers, pair.images)
        return fit(tokens, self.limits, self.bos_id)


def _repeats_prompt(pair: Pair) -> bool:
    prompt = pair.prompt.strip()
    return bool(prompt) and all(
        side.lstrip().startswith(prompt) for side in (pair.chosen, pair.rejected)
    )


def from_first_answer(pair: Pair) -> Pair:
    """The pair whose prompt ends before its first answer to a user: all turns after are scored."""
    roles = [message["role"] for message in pair.prompt]
    asked = roles.index("user") if "user" in roles else 0
    first = next((i for i in range(asked, len(roles)) if roles[i] == "assistant"), len(roles))
    history = pair.prompt[first:]
    sides = {"chosen": history + pair.chosen, "rejected": history + pair.rejected}
    return replace(pair, prompt=pair.prompt[:first], begun=None, **sides)


class TokenizedReader:
    """Batches that hold token ids already -> the same columns, checked and cut."""

    def __init__(self, limits: Limits, bos_id: int | None, images: bool = False):
        self.limits, self.bos_id, self.images = limits, bos_id, images

    def __call__(
        self, batch: dict[str, list[Any]], indices: list[int] | None = None
    ) -> dict[str, list[Any]]:
        names = [
            name for name in (*TOKEN_COLUMNS, *UNSCORED_COLUMNS, *NUMBER_COLUMNS) if name in batch
        ]
        rows = [
            dict(zip(names, row, strict=True))
            for row in zip(*(batch[name] for name in names), strict=True)
        ]
        origins = list(range(len(rows))) if indices is None else indices
        made = (attempt(self._read, row) for row in rows)
        return token_columns(made, self.images) | {"row": origins}

    def _read(self, row: dict[str, Any]) -> Tokens:
        numbers = numbers_of(row)
        for name, ids in row.items():
            if name in NUMBER_COLUMNS:
                continue
            if not isinstance(ids, list) or not all(
                isinstance(i, int) and 0 <= i <= _LARGEST_ID for i in ids
            ):
                raise RowProblem(WRONG_TYPE, f"{name} is not a list of token ids")
        prompt, *sides = (row[name] for name in TOKEN_COLUMNS)
        left = [sorted(set(row.get(name, []))) for name in UNSCORED_COLUMNS]
        for name, ids, positions in zip(UNSCORED_COLUMNS, sides, left, strict=True):
            if positions and (positions[-1] >= len(ids) or len(positions) == len(ids)):
                raise RowProblem(NOT_SCORED, f"{name} has a position past the end, or all of them")
        tokens = Tokens(prompt, *sides, flags=set(), unscored=(left[0], left[1]), numbers=numbers)
        return fit(tokens, self.limits, self.bos_id)
