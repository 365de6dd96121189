"""More of `plain_objectives`: losses of two rewards, of sorted answers, and of likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.plain_objectives import (
    Batch,
    PlainCpo,
    PlainDpo,
    PlainOrpo,
    PlainSimpo,
    smoothed,
)
from tests.support.preference_batches import Pair, Sums, mean, nll, sigmoid

Losses = Callable[[float, float, "PlainRewards"], float]


@dataclass
class PlainRewards(PlainDpo):
    """A loss of the two rewards under a reference, given as a formula."""

    formula: Losses = lambda won, lost, hp: 0.0
    divergence: str = "reverse_kl"
    coefficient: float = 0.5

    def slope(self, ratio: float) -> float:
        u = math.exp(ratio)  # f'(u)
        if self.divergence == "forward_kl":
            return 1 - 1 / u
        if self.divergence == "js_divergence":
            return math.log(2 * u / (1 + u))
        if self.divergence == "alpha_divergence":
            return (u ** (self.coefficient - 1) - 1) / (self.coefficient - 1)
        return ratio

    def scores(self, pair: Pair, sums: Sums) -> tuple[float, float]:
        chosen, rejected = (
            self.slope(math.fsum(tokens) - reference) / (len(tokens) if self.length_norm else 1)
            for tokens, reference in zip(pair, sums, strict=True)
        )
        return chosen, rejected

    def margin(self, constant: Any) -> float:
        return 0.0

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        chosen, rejected = self.rewards(pair, sums)
        return self.formula(chosen, rejected, self)


def hinge(won: float, lost: float, hp: PlainRewards) -> float:
    return max(0.0, 1 - (won - lost))


def logistic(won: float, lost: float, hp: PlainRewards) -> float:
    return smoothed(won - lost, hp.epsilon)


def robust(won: float, lost: float, hp: PlainRewards) -> float:
    return ((1 - hp.epsilon) * nll(won - lost) - hp.epsilon * nll(lost - won)) / (
        1 - 2 * hp.epsilon
    )


def exo(won: float, lost: float, hp: PlainRewards) -> float:
    target = (1 - hp.epsilon, hp.epsilon)
    own = (sigmoid(won - lost), sigmoid(lost - won))
    return math.fsum(q * math.log(q / p) for q, p in zip(own, target, strict=True))


def nca(won: float, lost: float, hp: PlainRewards) -> float:
    return -math.log(sigmoid(won)) - math.log(sigmoid(-won)) / 2 - math.log(sigmoid(-lost)) / 2


def bco(won: float, lost: float, hp: PlainRewards) -> float:
    return -math.log(sigmoid(won)) - math.log(sigmoid(-lost))


def sppo(won: float, lost: float, hp: PlainRewards) -> float:
    return (won / hp.beta - 0.5 / hp.beta) ** 2 + (lost / hp.beta + 0.5 / hp.beta) ** 2


def apo_zero(won: float, lost: float, hp: PlainRewards) -> float:
    return 1 - sigmoid(won) + sigmoid(lost)


def apo_down(won: float, lost: float, hp: PlainRewards) -> float:
    return sigmoid(won) + 1 - sigmoid(won - lost)


def discopop(won: float, lost: float, hp: PlainRewards, tau: float = 0.05) -> float:
    share = sigmoid((won - lost) / tau)
    return nll(won - lost) * (1 - share) + math.exp(lost - won) * share


class PlainFIpo(PlainRewards):
    def margin(self, constant: Any) -> float:
        return 0.5

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        chosen, rejected = self.scores(pair, sums)
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass
class PlainBco(PlainRewards):
    total: float = 0.0
    count: int = 0

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        if training:
            rewards = [reward for item in batch for reward in self.rewards(*item)]
            self.total += math.fsum(rewards)
            self.count += len(rewards)
        return [self.total / max(self.count, 1)] * len(batch)

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        chosen, rejected = self.rewards(pair, sums)
        return nll(chosen - constant) + nll(constant - rejected)


def at_rank(values: list[float], others: list[float]) -> list[float]:
    """For each of ``values`` the one of ``others`` that has its place among its own."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ordered = sorted(others)
    places = {i: place for place, i in enumerate(order)}
    return [ordered[places[i]] for i in range(len(values))]


class PlainAot(PlainRewards):
    def gap(self, pair: Pair, sums: Sums) -> float:
        """The policy's alone."""
        return self.beta * (math.fsum(pair[0]) - math.fsum(pair[1]))

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        frozen = [self.beta * (sums[0] - sums[1]) for _, sums in batch]
        return at_rank([self.gap(*item) for item in batch], frozen)

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return smoothed(self.gap(pair, sums) - constant, self.epsilon)


class PlainAotUnpaired(PlainRewards):
    def constants(self, batch: Batch, training: bool) -> list[Any]:
        chosen, rejected = zip(*(self.rewards(*item) for item in batch), strict=True)
        pairs = (at_rank([*chosen], [*rejected]), at_rank([*rejected], [*chosen]))
        return list(zip(*pairs, strict=True))

    def terms(self, pair: Pair, sums: Sums, constant: Any) -> float:
        """Those of both answers, each of which another pair's answer shares."""
        chosen, rejected = self.rewards(pair, sums)
        below, above = constant
        return smoothed(chosen - below, self.epsilon) + smoothed(above - rejected, self.epsilon)

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return self.terms(pair, sums, constant) / 2

    def differentiated(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return self.terms(pair, sums, constant)


@dataclass
class PlainAlphaPo(PlainSimpo):
    alpha: float = 0.25

    def scores(self, pair: Pair, sums: Sums) -> tuple[float, float]:
        chosen, rejected = ((1 - math.exp(mean(y)) ** -self.alpha) / self.alpha for y in pair)
        return chosen, rejected


@dataclass
class PlainRepo(PlainSimpo):
    beta: float = 1.0

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return max(0.0, constant - (mean(pair[0]) - mean(pair[1])))


@dataclass
class PlainSimper(PlainSimpo):
    beta: float = 1.0
    ratio: float = 0.0

    def scores(self, pair: Pair, sums: Sums) -> tuple[float, float]:
        return math.exp(mean(pair[0])), math.exp(mean(pair[1]))

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        chosen, rejected = self.scores(pair, sums)
        return -chosen + rejected


class PlainCpoHinge(PlainCpo):
    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return max(0.0, 1 - self.gap(pair, sums)) - self.alpha * mean(pair[0])


@dataclass
class PlainCpoIpo(PlainCpo):
    length_norm: bool = True

    def margin(self, constant: Any) -> float:
        return 0.5

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        chosen, rejected = self.scores(pair, sums)
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2 - self.alpha * mean(pair[0])


def of_tokens(pair: Pair, batch_mean: float) -> float:
    """A chosen answer's share of the mean over all chosen tokens of a batch, times its pairs."""
    return -math.fsum(pair[0]) / batch_mean


@dataclass
class PlainSft(PlainSimpo):
    """``tokens``: averages over all of the batch's chosen tokens, and not answer by answer."""

    beta: float = 1.0
    ratio: float = 0.0
    tokens: bool = False

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        return [mean([len(pair[0]) for pair, _ in batch])] * len(batch)

    def margin(self, constant: Any) -> float:
        return 0.0

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return of_tokens(pair, constant if self.tokens else len(pair[0]))


class PlainCpoOfTokens(PlainCpo):
    constants = PlainSft.constants

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return nll(self.gap(pair, sums)) + self.alpha * of_tokens(pair, constant)


class PlainOrpoOfTokens(PlainOrpo):
    constants = PlainSft.constants

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return super().loss(pair, sums, constant) + mean(pair[0]) + of_tokens(pair, constant)
