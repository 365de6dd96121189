"""gamma-PO, arXiv 2506.03690: target margins that a pair earns among others.

    gamma-simpo:  -log sigmoid(D_i - gamma_i)
    gamma-dpo:    dpo's loss of D_i - (gamma_i - g), D_i the gap to the reference model

A set of n gaps holds the global micro-batch's own, by pair id, and gaps sampled from a queue of
the last 2048, 256 in all. From p_j = 1/n, 20 times:

    gamma_j = g * n * p_j                                      g = beta * gamma_beta_ratio
    grad_j  = tau * (1 + log(n * (p_j + 1e-10))) + g * sigmoid(gamma_j - D_j)
    p       = p * exp(-lr * grad), normalised                  lr = min(0.5 / tau, 1)

and gamma_i is the last pass's, before its update. Unlike in the released trainer, the queue is the
same on every rank, starts empty rather than with random numbers, is fed in training only, and
nothing is read back to the host. Its label smoothing turns gamma's sign; this one is dpo's.

Margins are fp64: a few hundred numbers. Shapes: P pairs of this rank, G rows over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..gather import GlobalPairs, pad_to_multiple
from ..settings import Hyperparameters, setting
from ..state import State, draw_uniform, seeded_generator
from ..terms import Pairs, Terms, margin_terms
from .dpo import DpoHyperparameters, log_ratios, reward_terms
from .simpo import MarginHyperparameters

QUEUE_SIZE = 2048
SET_SIZE = 256
PASSES = 20
_EPS = 1e-10


@dataclass(frozen=True)
class DynamicMargin(Hyperparameters):
    tau: float = setting(10.0, "how strongly margins are held near each other", above=0)
    sampling_seed: int = setting(0, "seed of the draws from the queue of past gaps", at_least=0)


@dataclass(frozen=True)
class GammaSimpoHyperparameters(DynamicMargin, MarginHyperparameters):
    pass


@dataclass(frozen=True)
class GammaDpoHyperparameters(DynamicMargin, DpoHyperparameters):
    """A ratio of 10 makes g 1, as gamma-simpo's defaults do."""

    gamma_beta_ratio: float = setting(10.0, "average target margin divided by beta", at_least=0)


def initial_state(hp: DynamicMargin) -> State:
    return {
        "queue": torch.zeros(QUEUE_SIZE, dtype=torch.float64),
        "head": torch.zeros((), dtype=torch.int64),  # the slot to write next
        "fill": torch.zeros((), dtype=torch.int64),  # slots in use: the first ones
        "generator": seeded_generator(hp.sampling_seed),
    }


def gamma_simpo_terms(pairs: Pairs, hp: GammaSimpoHyperparameters, state: State) -> Terms:
    chosen_means, rejected_means = pairs.means.chunk(2)
    gaps = hp.beta * (chosen_means - rejected_means)
    margins, state = dynamic_margins(pairs, gaps, hp.gamma, hp.tau, state)
    return margin_terms(pairs, hp.beta, margins, state=state)


def gamma_dpo_terms(pairs: Pairs, hp: GammaDpoHyperparameters, state: State) -> Terms:
    rewards = hp.beta * log_ratios(pairs, hp.length_norm)
    chosen, rejected = rewards.chunk(2)
    gamma = hp.beta * hp.gamma_beta_ratio
    margins, state = dynamic_margins(pairs, chosen - rejected, gamma, hp.tau, state)
    return reward_terms(rewards, pairs.widened(margins - gamma), hp.label_smoothing, state)


@torch.no_grad()
def dynamic_margins(
    pairs: Pairs, gaps: Tensor, gamma: float, tau: float, state: State
) -> tuple[Tensor, State]:
    """Target margins [P] fp64 of pairs with these ``gaps`` [P], and the next state.

    The margins of a set average to ``gamma``. A pair whose gap is not finite is in no set; it gets
    the margin of one that stands alone.
    """
    current = pairs.gather(gaps)
    keys, generator = draw_uniform(state["generator"], QUEUE_SIZE, gaps.device)
    values, count = joint_set(current, keys, state)
    margins = solve_margins(values, count, gamma, tau)[current.mine]
    margins = torch.where(current.used[current.mine], margins, gamma)
    return margins, pushed(current, state) | {"generator": generator}


def joint_set(current: GlobalPairs, keys: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """The current gaps, then gaps of the filled slots with the smallest ``keys`` [2048].

    Returns values [G, rounded up to a multiple of 256] and how many count. The number of keys is
    fixed, so what is sampled depends on the current pairs only through their number.
    """
    slots = torch.arange(QUEUE_SIZE, device=keys.device)
    order = keys.masked_fill(slots >= state["fill"], torch.inf).argsort(stable=True)
    sampled = state["queue"][order[:SET_SIZE]]
    extra = (SET_SIZE - current.count).clamp(min=0).minimum(state["fill"])
    gaps = pad_to_multiple(current.values[:, 0])
    places = torch.arange(len(gaps), device=keys.device)
    values = torch.where(
        places < current.count, gaps, sampled[(places - current.count).clamp(0, SET_SIZE - 1)]
    )
    return values, current.count + extra


def solve_margins(gaps: Tensor, count: Tensor, gamma: float, tau: float) -> Tensor:
    """gamma_j of the first ``count`` of ``gaps`` [G]; what follows them is padding.

    Keeps log p up to a constant, which softmax takes out along with the constants of grad: seven
    small operations a pass. Padding is at minus infinity, so softmax adds exact zeros for it; up
    to 512 rows on a GPU and always on a CPU, it does so in an order that does not change with G.
    """
    used = torch.arange(len(gaps), device=gaps.device) < count
    negated, scale = -gaps, gamma * count.to(gaps.dtype)
    lr = min(0.5 / tau, 1.0)
    log_p = torch.zeros_like(gaps).masked_fill(~used, -torch.inf)
    p = log_p.softmax(0)
    for _ in range(PASSES - 1):
        push = torch.addcmul(negated, scale, p).sigmoid()
        pull = (p + _EPS).log()
        log_p = log_p.sub(push, alpha=lr * gamma).sub(pull, alpha=lr * tau)
        p = log_p.softmax(0)
    return scale * p


def pushed(current: GlobalPairs, state: State) -> State:
    """The state with the current gaps in the queue; of more than 2048, the last 2048.

    Each slot looks up the last gap that lands on it: a gather, so its order is defined and nothing
    is written for the rows that do not count.
    """
    count, head = current.count, state["head"]
    slots = torch.arange(QUEUE_SIZE, device=head.device)
    first = (slots - head) % QUEUE_SIZE
    rounds = (count - 1 - first).div(QUEUE_SIZE, rounding_mode="floor").clamp(min=0)
    gaps = pad_to_multiple(current.values[:, 0])
    landing = gaps[(first + rounds * QUEUE_SIZE).clamp(max=len(gaps) - 1)]
    return {
        "queue": torch.where(first < count, landing, state["queue"]),
        "head": (head + count) % QUEUE_SIZE,
        "fill": (state["fill"] + count).clamp(max=QUEUE_SIZE),
    }
