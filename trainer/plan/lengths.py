"""Lengths of the pairs: measured on the data, or assumed, and which of the two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import load_pairs
from ..data.table import PairLengths, PairRows
from ..errors import UserError
from ..model.loading import load_tokenizer
from ..settings.config import PreferenceConfig

ASSUMED_PAIRS = 60_000
PROMPT_SPREAD, ANSWER_SPREAD, ANSWER_CORRELATION = 1.0, 0.66, 0.5
"""Standard deviations over means of assumed lengths, and how alike a pair's answers are, as of
instruction-tuning prompts and chat models' answers."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of the training pairs and their source; ``bound``: no pair can be longer."""

    pairs: PairLengths
    source: str
    bound: bool = False


def find_lengths(
    settings: PreferenceConfig,
    vocab_size: int,
    means: tuple[float, float, float] | None,
    count: int | None,
) -> Lengths:
    """The training data's lengths if it is on this machine, else assumed ones.

    Args:
        means: of prompt, chosen and rejected tokens; they win over the data's.
        count: pairs to assume.

    Raises:
        UserError: there is nothing to go by, or data that is here cannot be read.
    """
    pairs = count or ASSUMED_PAIRS
    number = f"{pairs:,} pairs" + ("" if count else " (assumed; --pairs N)")
    if means is not None:
        text = ", ".join(f"{mean:g}" for mean in means)
        return Lengths(
            assumed(settings, means, pairs),
            f"{number} drawn with mean prompt, chosen, rejected lengths {text}; standard deviation "
            f"{PROMPT_SPREAD:g} of the mean for prompts, {ANSWER_SPREAD:g} for answers, cut at the "
            "config's limits",
        )
    names = list(settings.mixture())
    why = "no data set is named"
    if names:
        missing = [name for name in names if not Path(name).expanduser().exists()]
        why = f"{', '.join(missing)} not on this machine"
        if not missing:
            return _of_data(settings, vocab_size, names)
    return Lengths(
        at_limits(settings, pairs),
        f"{why}: {number}, every one as long as max_length allows, so memory and time are upper "
        "bounds; --mean-lengths PROMPT,CHOSEN,REJECTED for an estimate",
        bound=True,
    )


def _of_data(settings: PreferenceConfig, vocab_size: int, names: list[str]) -> Lengths:
    data = load_pairs(settings, load_tokenizer(settings), vocab_size)
    if data.train is None or not len(data.train):
        raise UserError("dataset_splits: none of them is for training; name a train split")
    lengths = PairRows.of(data.train, settings).lengths
    means = (lengths.prompt.mean(), lengths.chosen.mean(), lengths.rejected.mean())
    text = ", ".join(f"{mean:.0f}" for mean in means)
    return Lengths(
        lengths,
        f"{len(lengths):,} pairs of {', '.join(names)}, tokenized; mean prompt, chosen, rejected "
        f"{text} tokens",
    )


def assumed(
    settings: PreferenceConfig, means: tuple[float, float, float], count: int
) -> PairLengths:
    """Log-normal lengths of these means, cut as training would cut them; the same every time."""
    generator = np.random.default_rng(0)
    shared, independent = generator.standard_normal((2, 3, count))
    alike = np.sqrt(ANSWER_CORRELATION)
    normal = independent * np.sqrt(1 - ANSWER_CORRELATION) + alike * shared[1]
    normal[0] = independent[0]
    spreads = np.array([PROMPT_SPREAD, ANSWER_SPREAD, ANSWER_SPREAD])[:, None]
    variance = np.log1p(spreads**2)
    lengths = np.exp(normal * np.sqrt(variance) - variance / 2) * np.array(means)[:, None]
    prompt, *answers = np.maximum(1, np.rint(lengths)).astype(np.int64)
    longest = settings.max_length or np.iinfo(np.int64).max
    prompt = np.minimum(prompt, min(settings.max_prompt_length or longest, longest - 1))
    room = np.minimum(longest - prompt, settings.max_completion_length or longest)
    return PairLengths(prompt, *(np.minimum(answer, room) for answer in answers))


def at_limits(settings: PreferenceConfig, count: int) -> PairLengths:
    """Every pair as expensive as the config lets one be: two long answers to a short prompt."""
    if settings.max_length is None:
        raise UserError(
            "max_length: without it, and without the data, lengths are not known; give "
            "--mean-lengths PROMPT,CHOSEN,REJECTED"
        )
    answer = min(settings.max_length - 1, settings.max_completion_length or settings.max_length)
    prompt = max(1, min(settings.max_length - answer, settings.max_prompt_length or answer))
    prompts, answers = (np.full(count, length) for length in (prompt, answer))
    return PairLengths(prompts, answers, answers)
