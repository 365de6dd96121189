"""How well a model's rewards tell chosen answers from rejected ones: numpy, and tables of it.

A reward is β times one of: ``mean_logps``, the mean log-prob of an answer's tokens (SimPO, LMPO);
``sum_logps``, their sum; ``against_reference``, the sum less a reference model's (DPO). The
*margin* of a pair is chosen less rejected, in nats and without β, which moves no accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

import numpy as np

from ..data.table import PairLengths
from .results import table

BINS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SIDES = ("chosen", "rejected")
LENGTH_GROUPS = ("chosen_longer", "rejected_longer", "same_length")


@dataclass
class PairLogps:
    """Summed log-probs of each pair's completions, [pairs] float64, in nats."""

    chosen: np.ndarray
    rejected: np.ndarray


def pair_margins(
    logps: PairLogps, lengths: PairLengths, reference: PairLogps | None
) -> dict[str, np.ndarray]:
    """Kind of reward -> margins [pairs]."""
    margins = {
        "mean_logps": logps.chosen / lengths.chosen - logps.rejected / lengths.rejected,
        "sum_logps": logps.chosen - logps.rejected,
    }
    if reference is not None:
        chosen, rejected = logps.chosen - reference.chosen, logps.rejected - reference.rejected
        margins["against_reference"] = chosen - rejected
    return margins


def measure(
    logps: PairLogps,
    lengths: PairLengths,
    reference: PairLogps | None,
    betas: dict[str, float],
) -> dict[str, Any]:
    """All measures of the pairs, as plain values; None for a group without pairs."""
    rewards = {
        kind: reward_metrics(margins, lengths.chosen - lengths.rejected, betas[kind])
        for kind, margins in pair_margins(logps, lengths, reference).items()
    }
    sums = {"chosen": logps.chosen, "rejected": logps.rejected}
    counts = {"chosen": lengths.chosen, "rejected": lengths.rejected}
    return {
        "pairs": len(lengths),
        "tokens": {"prompt": _mean(lengths.prompt)} | {s: _mean(counts[s]) for s in SIDES},
        "chosen_longer": _mean(lengths.chosen > lengths.rejected),
        "mean_logps": {side: _mean(sums[side] / counts[side]) for side in SIDES},
        "sum_logps": {side: _mean(sums[side]) for side in SIDES},
        "rewards": rewards,
    }


def reward_metrics(margins: np.ndarray, longer: np.ndarray, beta: float) -> dict[str, Any]:
    """One kind of reward.

    Args:
        margins: [pairs]. longer: [pairs] tokens that chosen has more than rejected.
        beta: for the calibration.
    """
    right = margins > 0
    groups = (longer > 0, longer < 0, longer == 0)
    accuracy = _mean(right)
    pairs = len(margins)
    error = None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / pairs)
    return {
        "beta": beta,
        "accuracy": accuracy,
        "accuracy_standard_error": error,
        "ties": int((margins == 0).sum()),
        "margin": {
            "mean": _mean(margins),
            "std": float(margins.std()) if pairs else None,
            "quantiles": {
                f"{q:g}": float(np.quantile(margins, q)) if pairs else None for q in QUANTILES
            },
        },
        "by_length": {
            name: {
                "pairs": int(group.sum()),
                "accuracy": _mean(right[group]),
                "margin": _mean(margins[group]),
            }
            for name, group in zip(LENGTH_GROUPS, groups, strict=True)
        },
        "correlation_with_length": correlation(margins, longer),
        "calibration": calibration(margins, beta),
    }


def calibration(margins: np.ndarray, beta: float) -> dict[str, Any]:
    """Whether σ(β·margin) is the probability that the answer preferred by the reward was chosen.

    Every pair counts with the side its reward prefers, so probabilities are from ½ to 1: in ten
    equal bins of them, the mean probability against the share of pairs where that side was indeed
    chosen (a tie counts half). ``ece`` is the mean distance of the two over pairs, ``log_loss`` the
    mean of −log σ(β·margin).
    """
    scaled = beta * margins
    confidence = 1 / (1 + np.exp(-np.abs(scaled)))
    outcome = np.where(margins == 0, 0.5, margins > 0)
    place = np.clip(((confidence - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    bins, distance = [], 0.0
    for i in range(BINS):
        inside = place == i
        probability, accuracy = _mean(confidence[inside]), _mean(outcome[inside])
        bins.append(
            {
                "from": 0.5 + i / (2 * BINS),
                "to": 0.5 + (i + 1) / (2 * BINS),
                "pairs": int(inside.sum()),
                "probability": probability,
                "accuracy": accuracy,
            }
        )
        if probability is not None and accuracy is not None:
            distance += inside.sum() * abs(probability - accuracy)
    return {
        "ece": float(distance / len(margins)) if len(margins) else None,
        "log_loss": _mean(np.logaddexp(0.0, -scaled)),
        "bins": bins,
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None


def correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    """Pearson's; None where either is the same for all pairs."""
    if len(one) < 2 or not one.std() or not other.std():
        return None
    return float(np.corrcoef(one, other)[0, 1])


def result_lines(result: dict[str, Any]) -> list[str]:
    """The tables for the terminal."""
    rewards = result["rewards"]

    def row(label: str, *path: str) -> list[Any]:
        return [label, *(reduce(getitem, path, metrics) for metrics in rewards.values())]

    groups = next(iter(rewards.values()))["by_length"]
    rows = [
        row("accuracy", "accuracy"),
        row("  standard error", "accuracy_standard_error"),
        *(
            row(f"  {_words(name)} ({group['pairs']:,})", "by_length", name, "accuracy")
            for name, group in groups.items()
        ),
        row("margin, mean", "margin", "mean"),
        *(row(f"  {q} quantile", "margin", "quantiles", q) for q in ("0.05", "0.5", "0.95")),
        row("correlation with length", "correlation_with_length"),
        row("beta", "beta"),
        row("calibration error", "calibration", "ece"),
        row("log loss", "calibration", "log_loss"),
    ]
    sides = [
        (label, *(result[key][side] for side in SIDES))
        for label, key in (
            ("tokens", "tokens"),
            ("mean logp", "mean_logps"),
            ("sum logp", "sum_logps"),
        )
    ]
    head = [f"{result['pairs']:,} pairs", *map(_words, rewards)]
    return [
        table(head, rows),
        "",
        table(["", *SIDES], sides),
        "",
        _calibration_table(rewards),
    ]


def _calibration_table(rewards: dict[str, Any]) -> str:
    """Bins of probability with pairs in them, for the first kind of reward."""
    kind, metrics = next(iter(rewards.items()))
    rows = [
        (f"{b['from']:.2f} to {b['to']:.2f}", b["pairs"], b["probability"], b["accuracy"])
        for b in metrics["calibration"]["bins"]
        if b["pairs"]
    ]
    return table((f"probability ({_words(kind)})", "pairs", "mean", "accuracy"), rows)


def _words(name: str) -> str:
    return name.replace("_", " ")
