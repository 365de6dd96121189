"""Which answers to a prompt make a pair, and why there are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data.formats.answers import Edges
from ..data.formats.converters import NO_PREFERENCE
from ..data.rows import RowProblem
from ..errors import UserError, expect_number, expect_one_of
from ..evaluation.results import Record

RULES = ("best-worst", "best-vs-rest", "all")
FORMS = ("pairs", "trees", "kto")
NO_TEXT, UNFINISHED, NO_SCORE = "answers without text", "unfinished answers", "answers not scored"
ALIKE, GAP, RATIO = "answers all the same", "scores too close", "lengths too far apart"
BALANCE = "left out to balance lengths"
REMEDIES = {
    NO_TEXT: "generate again with another --model, --seed or more --n, to another --out",
    UNFINISHED: "give --keep-unfinished, or generate with a larger --max_new_tokens",
    NO_SCORE: "score again by another scorer, with another --name",
    ALIKE: "generate with a higher --temperature or more --n, to another --out",
    NO_PREFERENCE: "score by what tells the answers apart; their scores are equal",
    GAP: "lower --min-gap",
    RATIO: "raise --max-length-ratio",
    BALANCE: "leave out --balance-length",
}
"""What to do where no prompt has a pair, by the reason of most."""


@dataclass
class PairRequest:
    """Which answers make a pair, and what is written; see the help of `widemargin pair`."""

    rule: str = "best-worst"
    form: str = "pairs"
    min_gap: float = 0.0
    max_length_ratio: float | None = None
    balance_length: bool = False
    keep_unfinished: bool = False
    tokens_for: str | None = None

    def check(self) -> None:
        expect_one_of("--rule", self.rule, RULES)
        expect_one_of("--as", self.form, FORMS)
        expect_number("--min-gap", self.min_gap, "a number from 0 on", least=0)
        if self.max_length_ratio is not None:
            ratio = self.max_length_ratio
            expect_number("--max-length-ratio", ratio, "a number from 1 on", least=1)
        if self.form == "kto" and self.rule == "all":
            raise UserError(
                "--rule: give best-worst or best-vs-rest for --as kto; by all, an answer can be "
                "better than one and worse than another, and has no one label"
            )
        if self.tokens_for is not None and self.form != "pairs":
            raise UserError(
                "--tokens-for: leave out --as; for trees of token ids, train the pairs with "
                "group_by_prompt: true"
            )


@dataclass
class Made:
    """A scored answer, and its length in the report's unit."""

    record: Record
    score: float | None
    length: int


Chosen = tuple[Made, Made]
"""A pair, the better answer first."""


def select(several: list[Made], request: PairRequest) -> list[Chosen]:
    """The pairs of one prompt's answers; ``RowProblem`` says why there are none."""
    kept = several
    keeps: dict[str, Callable[[Made], bool]] = {
        NO_TEXT: lambda it: bool(it.record["output"].strip()),
        UNFINISHED: lambda it: request.keep_unfinished or it.record["finish"] == "stop",
        NO_SCORE: lambda it: it.score is not None,
    }
    for reason, keep in keeps.items():
        kept = list(filter(keep, kept))
        if len(kept) < 2:
            raise RowProblem(reason)
    distinct: dict[str, Made] = {}
    for it in kept:
        distinct.setdefault(it.record["output"], it)
    if len(distinct) < 2:
        raise RowProblem(ALIKE)
    edges = Edges(request.rule).of([(float(it.score or 0), it) for it in distinct.values()])
    pairs = [(a, b) for (high, a), (low, b) in edges if high - low >= request.min_gap]
    if not pairs:
        raise RowProblem(GAP)
    most = request.max_length_ratio
    pairs = [two for two in pairs if most is None or _ratio(two) <= most]
    if not pairs:
        raise RowProblem(RATIO)
    return pairs


def _ratio(two: Chosen) -> float:
    lengths = [max(1, it.length) for it in two]
    return max(lengths) / min(lengths)


def balanced(pairs: dict[str, list[Chosen]]) -> dict[str, list[Chosen]]:
    """As many pairs whose chosen answer is the longer one as pairs whose rejected one is.

    Of the more frequent kind those are left out that differ most in length.
    """
    differences = [
        (a.length - b.length, key, place)
        for key, chosen in pairs.items()
        for place, (a, b) in enumerate(chosen)
    ]
    surplus = sum(int(np.sign(difference)) for difference, *_ in differences)
    order = sorted(differences, key=lambda it: it[0], reverse=surplus > 0)
    out = {(key, place) for _, key, place in order[: abs(surplus)]}
    left = {
        key: [two for place, two in enumerate(chosen) if (key, place) not in out]
        for key, chosen in pairs.items()
    }
    return {key: chosen for key, chosen in left.items() if chosen}
