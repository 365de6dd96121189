"""LMPO, arXiv 2502.14643: SimPO with a margin from the pair's own probabilities, z-normalised.

    loss = -log sigmoid(D - beta * gamma_beta_ratio - margin_weight * z)
    p(y) = exp(mean(y) * L / n),  L = (n_w + n_l) / 2          d = p_w - p_l
    m    = (1 - p_w) * phi(d)                                  detached
    z    = (m - a) / (b + 1e-6)

a and b are running means of the mean and of the unbiased standard deviation of m over the global
micro-batch, updated before use and in training only. The released trainer does not run (it calls a
method it lacks, never initialises a and b and gives b two names), updates in evaluation and divides
by the length of an empty completion; none of that is copied. Its recurrence from a = b = 0 is
``zscore_bias_correction=False``.

m is fp64 even for fp32 logps: where p is below 1e-8, as for most long answers, m in fp32 is 0.5 for
every pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..gather import GlobalPairs
from ..settings import setting
from ..terms import Pairs, State, Terms, margin_terms
from .simpo import MarginHyperparameters

_EPS_STD = 1e-6
_EPS_LOG = 1e-8


@dataclass(frozen=True)
class LmpoHyperparameters(MarginHyperparameters):
    margin_weight: float = setting(0.2, "weight of the z-normalised margin, lambda", at_least=0)
    margin_shape: str = setting(
        "power", "form of phi in the margin", choices=("power", "sigmoid", "log")
    )
    margin_power: int = setting(
        5, "k of the power shape (1 - d^k)/2; odd keeps the sign of d", choices=(1, 3, 5, 7, 9)
    )
    margin_length_norm: bool = setting(
        True, "take probabilities at the pair's average length rather than per token"
    )
    zscore_decay: float = setting(
        0.9, "decay of the running mean and deviation", at_least=0, below=1
    )
    zscore_bias_correction: bool = setting(
        True, "correct them for starting at zero; false reproduces the published recurrence"
    )


def initial_state(hp: LmpoHyperparameters) -> State:
    state = {key: torch.zeros((), dtype=torch.float64) for key in ("mean", "std")}
    return state | {key: torch.zeros((), dtype=torch.int64) for key in ("mean_steps", "std_steps")}


def lmpo_terms(pairs: Pairs, hp: LmpoHyperparameters, state: State) -> Terms:
    with torch.no_grad():
        m = raw_margins(pairs, hp)
        if pairs.training:
            state = updated_statistics(state, pairs.gather(m), hp.zscore_decay)
        margins = hp.gamma + hp.margin_weight * zscores(m, state, hp)
    return margin_terms(pairs, hp.beta, margins, state=state)


def raw_margins(pairs: Pairs, hp: LmpoHyperparameters) -> Tensor:
    """m of each pair, [P] fp64."""
    exponents = pairs.means.double()
    if hp.margin_length_norm:
        chosen_lengths, rejected_lengths = pairs.lengths.chunk(2)
        average_lengths = ((chosen_lengths + rejected_lengths) / 2.0).repeat(2)
        exponents = exponents * average_lengths.double() / pairs.lengths.clamp(min=1)
    p_chosen, p_rejected = exponents.exp().chunk(2)
    return (1 - p_chosen) * phi(p_chosen - p_rejected, hp)


def phi(d: Tensor, hp: LmpoHyperparameters) -> Tensor:
    """Falls from 1 to 0 (about 4 to -3 for ``log``) as d rises from -1 to 1."""
    if hp.margin_shape == "power":
        return (1 - d**hp.margin_power) / 2
    if hp.margin_shape == "sigmoid":
        return torch.sigmoid(-10 * d)
    return 0.5 + torch.log((1 - d + _EPS_LOG) / (1 + d + _EPS_LOG)) / 5


def updated_statistics(state: State, pairs: GlobalPairs, decay: float) -> State:
    """One pair updates the mean and leaves the deviation, which it does not have; none leaves both.

    Each has its own count of steps, for its own bias correction.
    """
    updated = {}
    for key, value, needed in (("mean", pairs.mean(), 1), ("std", pairs.std(), 2)):
        enough = pairs.count >= needed
        running = decay * state[key] + (1 - decay) * value
        updated[key] = torch.where(enough, running, state[key])
        updated[f"{key}_steps"] = state[f"{key}_steps"] + enough
    return updated


def zscores(m: Tensor, state: State, hp: LmpoHyperparameters) -> Tensor:
    """z of each pair, [P]; 0 until there has been a deviation to divide by."""
    mean, std = state["mean"], state["std"]
    if hp.zscore_bias_correction:
        mean = mean / (1 - hp.zscore_decay ** state["mean_steps"].double())
        std = std / (1 - hp.zscore_decay ** state["std_steps"].double())
    return torch.where(state["std_steps"] > 0, (m - mean) / (std + _EPS_STD), 0.0)
