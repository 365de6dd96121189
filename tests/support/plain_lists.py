"""Listwise losses of one prompt in Python floats, from the formulas of the papers alone.

``r`` are rewards, ``p`` mean log-probs, ``psi`` the scores, all by answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.support.preference_batches import mean, nll

Floats = Sequence[float]


def softmax(x: Floats) -> list[float]:
    shifted = [math.exp(each - max(x)) for each in x]
    return [each / math.fsum(shifted) for each in shifted]


def best_nll(p: Floats, psi: Floats) -> float:
    return -mean([mean_logp for mean_logp, score in zip(p, psi, strict=True) if score == max(psi)])


def infonca(r: Floats, psi: Floats, temperature: float = 1.0) -> float:
    weights = softmax([score / temperature for score in psi])
    return -math.fsum(w * math.log(q) for w, q in zip(weights, softmax(r), strict=True))


def nca(r: Floats, psi: Floats, temperature: float = 1.0) -> float:
    weights = softmax([score / temperature for score in psi])
    wins = math.fsum(w * nll(reward) for w, reward in zip(weights, r, strict=True))
    return wins + mean([nll(-reward) for reward in r])


def plackett_luce(r: Floats, psi: Floats) -> float:
    """Of each answer against all that are no better; the last against itself is 0."""
    return math.fsum(
        math.log(math.fsum(math.exp(r[j]) for j in range(len(r)) if psi[j] <= psi[i])) - r[i]
        for i in range(len(r))
    )


def lipo(r: Floats, psi: Floats, scale: float = 1.0) -> float:
    order = sorted(range(len(r)), key=lambda i: (-r[i], -psi[i], i))
    discount = {i: math.log(1 + rank) for rank, i in enumerate(order, 1)}
    gain = [2 ** (scale * score) - 1 for score in psi]
    return math.fsum(
        abs(gain[i] - gain[j]) * abs(1 / discount[i] - 1 / discount[j]) * nll(r[i] - r[j])
        for i in range(len(r))
        for j in range(len(r))
        if psi[i] > psi[j]
    )


def rrhf(p: Floats, psi: Floats) -> float:
    """Without its likelihood."""
    every = range(len(p))
    return math.fsum(max(0.0, p[i] - p[j]) for i in every for j in every if psi[i] < psi[j])


def pro(r: Floats, psi: Floats) -> float:
    """Without its likelihood: answer by answer, the softmax of it and all that are worse."""
    loss = 0.0
    for k in range(len(r)):
        worse = [j for j in range(len(r)) if psi[j] < psi[k]]
        if worse:
            own = math.exp(r[k] * max(psi[k] - psi[j] for j in worse))
            others = math.fsum(math.exp(r[j] * (psi[k] - psi[j])) for j in worse)
            loss -= math.log(own / (own + others))
    return loss
