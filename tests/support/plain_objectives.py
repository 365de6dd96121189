"""Every objective again, pair by pair in Python floats, from the formulas alone.

What is here shares nothing with the package: it is the second opinion the tests compare with. An
objective is split in two: ``constants``, what a batch makes of its state and holds constant for
each pair, and ``loss`` of one pair given that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.support.preference_batches import Pair, Sums, mean, nll, sigmoid

Batch = Sequence[tuple[Pair, Sums]]  # each pair with its sums under the reference model


def log_ratios(pair: Pair, sums: Sums, length_norm: bool) -> tuple[float, float]:
    chosen, rejected = (
        (math.fsum(tokens) - reference) / (len(tokens) if length_norm else 1)
        for tokens, reference in zip(pair, sums, strict=True)
    )
    return chosen, rejected


def smoothed(x: float, epsilon: float) -> float:
    return (1 - epsilon) * nll(x) + epsilon * nll(-x)


@dataclass
class PlainSimpo:
    beta: float = 2.0
    ratio: float = 0.5
    epsilon: float = 0.0

    def scores(self, pair: Pair, sums: Sums) -> tuple[float, float]:
        return mean(pair[0]), mean(pair[1])

    def rewards(self, pair: Pair, sums: Sums) -> tuple[float, float]:
        chosen, rejected = self.scores(pair, sums)
        return self.beta * chosen, self.beta * rejected

    def gap(self, pair: Pair, sums: Sums) -> float:
        chosen, rejected = self.rewards(pair, sums)
        return chosen - rejected

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        return [self.beta * self.ratio for _ in batch]

    def margin(self, constant: Any) -> float:
        return constant

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return smoothed(self.gap(pair, sums) - constant, self.epsilon)


class PlainHinge(PlainSimpo):
    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        return max(0.0, 1 - (self.gap(pair, sums) - constant))


@dataclass
class PlainLmpo(PlainSimpo):
    weight: float = 0.2
    shape: str = "power"
    power: int = 5
    length_norm: bool = True
    decay: float = 0.9
    correct: bool = True
    means: list[float] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)

    def raw(self, pair: Pair) -> float:
        average = (len(pair[0]) + len(pair[1])) / 2
        p_w, p_l = (
            math.exp(mean(y) * (average / len(y) if self.length_norm else 1.0)) for y in pair
        )
        d = p_w - p_l
        if self.shape == "power":
            phi = (1 - d**self.power) / 2
        elif self.shape == "sigmoid":
            phi = sigmoid(-10 * d)
        else:
            phi = 0.5 + math.log((1 - d + 1e-8) / (1 + d + 1e-8)) / 5
        return (1 - p_w) * phi

    def running(self, history: list[float]) -> float:
        value = 0.0
        for item in history:
            value = self.decay * value + (1 - self.decay) * item
        return value / (1 - self.decay ** len(history)) if self.correct else value

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        raw = [self.raw(pair) for pair, _ in batch]
        if training and raw:
            self.means.append(float(np.mean(raw)))
        if training and len(raw) > 1:
            self.stds.append(float(np.std(raw, ddof=1)))
        z = [0.0] * len(raw)
        if self.stds:
            a, b = self.running(self.means), self.running(self.stds)
            z = [(m - a) / (b + 1e-6) for m in raw]
        return [self.beta * self.ratio + self.weight * value for value in z]


@dataclass
class PlainDpo(PlainSimpo):
    beta: float = 0.1
    length_norm: bool = False

    def scores(self, pair: Pair, sums: Sums) -> tuple[float, float]:
        return log_ratios(pair, sums, self.length_norm)

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        return [0.0 for _ in batch]


@dataclass
class PlainRdpo(PlainDpo):
    alpha: float = 0.01

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        return [-self.alpha * (len(pair[0]) - len(pair[1])) for pair, _ in batch]


@dataclass
class PlainIpo(PlainDpo):
    length_norm: bool = True

    def margin(self, constant: Any) -> float:
        return self.beta / (2 * self.beta)

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        chosen, rejected = self.scores(pair, sums)
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


class PlainKto(PlainDpo):
    def constants(self, batch: Batch, training: bool) -> list[Any]:
        chosen, rejected = zip(*(self.scores(pair, sums) for pair, sums in batch), strict=True)
        return [(max(0.0, mean(chosen)), max(0.0, mean(rejected)))] * len(batch)

    def margin(self, constant: Any) -> float:
        return 0.0

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        chosen, rejected = self.scores(pair, sums)
        kl_chosen, kl_rejected = constant
        wins = 1 - sigmoid(self.beta * (chosen - kl_rejected))
        losses = 1 - sigmoid(self.beta * (kl_chosen - rejected))
        return (wins + losses) / 2


@dataclass
class PlainCpo(PlainSimpo):
    beta: float = 0.1
    alpha: float = 1.0
    length_norm: bool = False
    smoothing: float = 0.0

    def scores(self, pair: Pair, sums: Sums) -> tuple[float, float]:
        score = mean if self.length_norm else math.fsum
        return score(pair[0]), score(pair[1])

    def margin(self, constant: Any) -> float:
        return 0.0

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        gap, e = self.gap(pair, sums), self.smoothing
        return (1 - e) * nll(gap) + e * nll(-gap) - self.alpha * mean(pair[0])


@dataclass
class PlainOrpo(PlainSimpo):
    beta: float = 0.1  # alpha

    def margin(self, constant: Any) -> float:
        return 0.0

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        p_w, p_l = math.exp(mean(pair[0])), math.exp(mean(pair[1]))
        odds = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        return -math.log(p_w) + self.beta * nll(math.log(odds))


@dataclass
class Gammas:
    """gamma-PO's margins of a batch of gaps, with p itself rather than its logarithm."""

    gamma: float
    tau: float
    seed: int
    queue: dict[int, float] = field(default_factory=dict)  # slot -> gap
    pushes: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def sample(self, count: int, training: bool) -> list[float]:
        before = self.generator.get_state()
        keys = torch.rand(2048, generator=self.generator, dtype=torch.float64).tolist()
        if not training:
            self.generator.set_state(before)
        slots = sorted(self.queue, key=lambda slot: keys[slot])
        return [self.queue[slot] for slot in slots[: max(count, 0)]]

    def solve(self, gaps: list[float]) -> list[float]:
        n = len(gaps)
        lr = min(0.5 / self.tau, 1.0)
        p, gammas = [1 / n] * n, []
        for _ in range(20):
            gammas = [self.gamma * n * p_j for p_j in p]
            grads = [
                self.tau * (1 + math.log(n * (p_j + 1e-10))) + self.gamma * sigmoid(gamma - d)
                for p_j, gamma, d in zip(p, gammas, gaps, strict=True)
            ]
            p = [p_j * math.exp(-lr * grad) for p_j, grad in zip(p, grads, strict=True)]
            total = math.fsum(p)
            p = [p_j / total for p_j in p]
        return gammas

    def margins(self, own: list[float], training: bool) -> list[float]:
        margins = self.solve(own + self.sample(256 - len(own), training))[: len(own)]
        if training:
            for value in own:
                self.queue[self.pushes % 2048] = value
                self.pushes += 1
        return margins


@dataclass
class PlainGammaSimpo(PlainSimpo):
    tau: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.gammas = Gammas(self.beta * self.ratio, self.tau, self.seed)

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        return self.gammas.margins([self.gap(*item) for item in batch], training)


@dataclass
class PlainGammaDpo(PlainDpo):
    ratio: float = 10.0
    tau: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.gammas = Gammas(self.beta * self.ratio, self.tau, self.seed)

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        margins = self.gammas.margins([self.gap(*item) for item in batch], training)
        return [margin - self.beta * self.ratio for margin in margins]


@dataclass
class Betas:
    """beta_used of a batch of gaps, and the share of each pair's loss."""

    beta: float
    tau: float
    fraction: float
    decay: float
    seed: int
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def draw(self, gaps: list[float]) -> list[int]:
        """Sorted by log-weight plus Gumbel noise: one after the other, without replacement."""
        uniform = torch.rand(2048, generator=self.generator, dtype=torch.float64).tolist()
        keys = [
            -0.5 * ((d - self.mean) / self.std) ** 2 - math.log(-math.log(u))
            for d, u in zip(gaps, uniform, strict=False)
        ]
        order = sorted(range(len(gaps)), key=lambda i: -keys[i])
        return order[: max(1, math.floor(self.fraction * len(gaps) + 1e-9))]

    def step(self, gaps: list[float], training: bool) -> list[tuple[float, float]]:
        if not training:
            return [(self.beta, 1.0)] * len(gaps)
        drawn = self.draw(gaps)
        excess = mean([gaps[i] for i in drawn]) - self.mean
        used = max(self.beta * (1 + self.tau * excess), 1e-3)
        self.mean = self.decay * self.mean + (1 - self.decay) * mean(gaps)
        if len(gaps) > 1:
            deviation = float(np.std(gaps, ddof=1))
            self.std = self.decay * self.std + (1 - self.decay) * deviation
        share = len(gaps) / len(drawn)
        return [(used, share if i in drawn else 0.0) for i in range(len(gaps))]


@dataclass
class PlainBetaSimpo(PlainSimpo):
    tau: float = 0.6
    fraction: float = 0.8
    decay: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        self.betas = Betas(self.beta, self.tau, self.fraction, self.decay, self.seed)

    def constants(self, batch: Batch, training: bool) -> list[Any]:
        return self.betas.step([self.gap(*item) for item in batch], training)

    def margin(self, constant: Any) -> float:
        return constant[0] * self.ratio

    def loss(self, pair: Pair, sums: Sums, constant: Any) -> float:
        beta, share = constant
        chosen, rejected = self.scores(pair, sums)
        return share * smoothed(beta * (chosen - rejected) - beta * self.ratio, self.epsilon)


@dataclass
class PlainBetaDpo(PlainBetaSimpo):
    beta: float = 0.1
    ratio: float = 0.0
    length_norm: bool = False

    def scores(self, pair: Pair, sums: Sums) -> tuple[float, float]:
        return log_ratios(pair, sums, self.length_norm)
