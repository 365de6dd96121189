"""Signs of a collapse in what a run logs, long before its accuracy shows anything.

A loss that asks for a gap alone (SimPO's, and in part DPO's) is also met by making both answers
unlikely. Where that goes far, probability leaves everything that the model used to write: its
answers grow, repeat themselves, or end at once.

`Watch` depends on the log alone. transformers restores the log of a resumed run, so this run knows
what an uninterrupted one would know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ..errors import is_number

Point = tuple[int, float]

SAMPLED_TOKENS, SAMPLED_REPETITION = "samples/tokens", "samples/repetition"
"""Means over an evaluation's sampled answers: their length, and `repetition`."""

ADVICE = "Lower learning_rate, raise beta, or set sft_weight above 0"
GRAM = 4
ERRORS, FEWEST = 3.0, 5
"""Standard errors that a figure must move by, and the values that it takes to know one."""


class Kind(NamedTuple):
    """One figure of the log and how far it may move."""

    key: str
    is_bad: Callable[[float, float], bool]
    """Of its value at the beginning and now."""
    message: str
    window: int = 10
    """Steps whose mean counts, at the beginning and now: the pairs of single steps differ a lot."""


KINDS = {
    "chosen": Kind(
        "logps/chosen_mean",
        lambda before, now: now < before - 1.0,
        "the chosen answers' log-prob fell from {before:.2f} to {now:.2f} nats per token",
    ),
    "held-out chosen": Kind(
        "eval_logps/chosen_mean",
        lambda before, now: now < before - 1.0,
        "the held-out chosen answers' log-prob fell from {before:.2f} to {now:.2f} nats per token",
        window=1,
    ),
    "entropy": Kind(
        "entropy",
        lambda before, now: now > before + 1.0,
        "entropy rose from {before:.2f} to {now:.2f} nats per token",
    ),
    "length": Kind(
        SAMPLED_TOKENS,
        lambda before, now: now > 2 * before + 16,
        "sampled answers grew from {before:.0f} to {now:.0f} tokens",
        window=1,
    ),
    "shortness": Kind(
        SAMPLED_TOKENS,
        lambda before, now: now < before / 8,
        "sampled answers shrank from {before:.0f} to {now:.0f} tokens",
        window=1,
    ),
    "repetition": Kind(
        SAMPLED_REPETITION,
        lambda before, now: now > before + 0.3,
        "sampled answers repeat themselves: {now:.0%} of their 4-grams, {before:.0%} at first",
        window=1,
    ),
}


@dataclass(frozen=True)
class Sign:
    """A kind of collapse: the step that showed it first, and the figure then and at first."""

    kind: str
    step: int
    before: float
    now: float

    def __str__(self) -> str:
        said = KINDS[self.kind].message.format(before=self.before, now=self.now)
        return f"step {self.step}: {said}"


class Watch:
    """Reads the entries of a log one by one.

    Attributes:
        signs: by kind, of which each shows once.
    """

    def __init__(self) -> None:
        self.signs: dict[str, Sign] = {}
        self._first: dict[str, list[Point]] = {}
        self._latest: dict[str, list[Point]] = {}

    def add(self, entry: Mapping[str, Any]) -> list[Sign]:
        """The signs that this entry is the first to show."""
        seen = (self._look(name, key, entry) for name in KINDS for key in _keys(name, entry))
        new = [sign for sign in seen if sign is not None]
        self.signs |= {sign.kind: sign for sign in new}
        return new

    def _look(self, name: str, key: str, entry: Mapping[str, Any]) -> Sign | None:
        kind = KINDS[name]
        step, value = entry.get("step", math.nan), entry[key]
        if not (is_number(value) and is_number(step)) or name in self.signs:
            return None
        figure = f"{name} {key}"
        first = self._first.setdefault(figure, [])
        if not first or step <= max(kind.window, first[0][0]):
            first.append((step, value))
        latest = [*self._latest.get(figure, []), (step, value)]
        latest = [point for point in latest if point[0] > step - kind.window]
        self._latest[figure] = latest
        before, now = _mean(first), _mean(latest)
        is_noise = abs(now - before) <= ERRORS * math.hypot(_error(first), _error(latest))
        return Sign(name, step, before, now) if kind.is_bad(before, now) and not is_noise else None


def _keys(name: str, entry: Mapping[str, Any]) -> list[str]:
    """Where the entry has the figure of a kind: of an evaluation, also under its set's name."""
    key, _, held_out = KINDS[name].key.partition("eval_")
    if held_out:
        return [k for k in entry if k.startswith("eval_") and k.endswith(f"_{held_out}")]
    return [key] if key in entry else []


def repetition(token_ids: list[int]) -> float:
    """The share of an answer's 4-grams that it had before, from 0 to 1."""
    grams = list(zip(*(token_ids[i:] for i in range(GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _mean(points: list[Point]) -> float:
    return fmean(value for _, value in points)


def _error(points: list[Point]) -> float:
    """The mean's standard error, as far as several points tell it: steps of few pairs differ."""
    values = [value for _, value in points]
    return stdev(values) / math.sqrt(len(values)) if len(values) >= FEWEST else 0.0
