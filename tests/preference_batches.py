"""Random packed micro-batches, and objectives computed plainly from lists of Python floats.

What is here shares nothing with the package: it is the second opinion the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Pair = tuple[list[float], list[float]]  # token logps of chosen and of rejected


def random_pairs(rng: np.random.Generator, count: int, longest: int = 12) -> list[Pair]:
    """Pairs of different lengths, with probabilities large enough for LMPO's margin to vary."""

    def tokens() -> list[float]:
        return (-0.3 * np.abs(rng.standard_normal(rng.integers(1, longest + 1)))).tolist()

    return [(tokens(), tokens()) for _ in range(count)]


def pack(pairs: Sequence[Pair], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """token_logps [N], requiring grad, and cu_seqlens [2P + 1] of P chosen, then P rejected."""
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    cu_seqlens = np.cumsum([0] + [len(sequence) for sequence in sequences])
    tokens = torch.tensor([x for sequence in sequences for x in sequence], dtype=dtype)
    return tokens.requires_grad_(), torch.tensor(cu_seqlens, dtype=torch.int32)


def rounded(pairs: Sequence[Pair], dtype: torch.dtype) -> list[Pair]:
    """The pairs as they are after a conversion to ``dtype``."""

    def convert(tokens: list[float]) -> list[float]:
        return torch.tensor(tokens, dtype=dtype).double().tolist()

    return [(convert(chosen), convert(rejected)) for chosen, rejected in pairs]


def mean(tokens: Sequence[float]) -> float:
    return math.fsum(tokens) / len(tokens) if tokens else 0.0


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def nll(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log1p(math.exp(-x)) if x >= 0 else -x + math.log1p(math.exp(x))


def gap(pair: Pair, beta: float) -> float:
    return beta * (mean(pair[0]) - mean(pair[1]))


@dataclass
class PlainLmpo:
    """Target margins of LMPO, batch after batch."""

    beta: float = 2.0
    ratio: float = 0.5
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

    def margins(self, pairs: Sequence[Pair], training: bool = True) -> list[float]:
        raw = [self.raw(pair) for pair in pairs]
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
class PlainGamma:
    """Target margins of gamma-PO, batch after batch, with p itself rather than its logarithm."""

    beta: float = 2.0
    ratio: float = 0.5
    tau: float = 10.0
    seed: int = 0
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
        g0, n = self.beta * self.ratio, len(gaps)
        lr = min(0.5 / self.tau, 1.0)
        p, gammas = [1 / n] * n, []
        for _ in range(20):
            gammas = [g0 * n * p_j for p_j in p]
            grads = [
                self.tau * (1 + math.log(n * (p_j + 1e-10))) + g0 * sigmoid(gamma - d)
                for p_j, gamma, d in zip(p, gammas, gaps, strict=True)
            ]
            p = [p_j * math.exp(-lr * grad) for p_j, grad in zip(p, grads, strict=True)]
            total = math.fsum(p)
            p = [p_j / total for p_j in p]
        return gammas

    def margins(self, pairs: Sequence[Pair], training: bool = True) -> list[float]:
        own = [gap(pair, self.beta) for pair in pairs]
        margins = self.solve(own + self.sample(256 - len(own), training))[: len(own)]
        if training:
            for value in own:
                self.queue[self.pushes % 2048] = value
                self.pushes += 1
        return margins
