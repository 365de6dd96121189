"""Random packed micro-batches, and the small formulas of preference losses in Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Pair = tuple[list[float], list[float]]  # token logps of chosen and of rejected
Sums = tuple[float, float]  # the same under a reference model, summed


def random_pairs(rng: np.random.Generator, count: int, longest: int = 12) -> list[Pair]:
    """Pairs of different lengths, with probabilities large enough for LMPO's margin to vary."""

    ends = np.cumsum(rng.integers(1, longest + 1, 2 * count))
    tokens = -0.3 * np.abs(rng.standard_normal(ends[-1]))
    sequences = [part.tolist() for part in np.split(tokens, ends[:-1])]
    return list(zip(sequences[::2], sequences[1::2], strict=True))


def pack(pairs: Sequence[Pair], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """token_logps [N], requiring grad, and cu_seqlens [2P + 1] of P chosen, then P rejected."""
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    cu_seqlens = np.cumsum([0] + [len(sequence) for sequence in sequences])
    tokens = torch.tensor([x for sequence in sequences for x in sequence], dtype=dtype)
    return tokens.requires_grad_(), torch.tensor(cu_seqlens, dtype=torch.int32)


def references(pairs: Sequence[Pair]) -> list[Sums]:
    """Sums under a made-up reference model, near the policy's: a function of each completion."""

    def total(tokens: list[float]) -> float:
        policy = math.fsum(tokens)
        return 0.9 * policy - 0.3 * math.sin(37 * policy)

    return [(total(chosen), total(rejected)) for chosen, rejected in pairs]


def reference_sums(pairs: Sequence[Pair], dtype: torch.dtype = torch.float64) -> Tensor:
    """`references` as objectives take them, [2P]."""
    return torch.tensor(references(pairs), dtype=dtype).reshape(-1, 2).T.reshape(-1)


def rounded(pairs: Sequence[Pair], dtype: torch.dtype) -> list[Pair]:
    """The pairs as they are after a conversion to ``dtype``."""
    precision = {torch.float64: np.float64, torch.float32: np.float32}[dtype]

    def convert(tokens: list[float]) -> list[float]:
        return np.array(tokens, precision).tolist()

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


def called(pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an objective is called with: token logps, boundaries, the reference model's sums."""
    return *pack(pairs), reference_sums(pairs)
