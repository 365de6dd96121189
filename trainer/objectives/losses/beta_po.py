"""beta-DPO, arXiv 2407.08639, and its form of SimPO: beta follows the batch, outliers are left out.

With the gaps D_i at the plain beta and running a (mean, from 0) and b (deviation, from 1) of them,
each training micro-batch draws 80% of its pairs, at least one, without replacement and with weights
``exp(-((D_i - a) / b)^2 / 2)``. Over those pairs:

    beta_used = max(beta * (1 + tau * (mean of the drawn D_i - a)), 1e-3)
    beta-simpo:  simpo's loss with beta_used in place of beta, in the margin too
    beta-dpo:    dpo's loss likewise

and then a and b move by a tenth towards the mean and deviation of all the micro-batch's gaps.
Evaluation takes every pair at the plain beta. beta_used and the draw are held constant.

*Micro-batch* is the global one, so ranks change nothing: every rank draws for all pairs, from the
same generator. A pair not drawn has loss 0 and a drawn one n / k times its own, for k drawn of n,
so that the mean over all n, which is what a trainer takes, is the mean over the k drawn.

Published trainers differ: beta-DPO's takes gaps without beta and updates a and b before use, also
in evaluation; gamma-PO's draws pairs and then averages over all of them regardless.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels.margin_loss.function import pair_losses
from ..gather import GlobalPairs, padded_sum
from ..settings import Hyperparameters, setting
from ..state import State, draw_uniform, seeded_generator
from ..terms import Pairs, Terms
from .dpo import DpoHyperparameters, log_ratios
from .simpo import SimpoHyperparameters

DRAWS = 2048  # per micro-batch, however many pairs it has: pair i takes draw i modulo this
LEAST_BETA = 1e-3
_EPS_STD = 1e-10


@dataclass(frozen=True)
class DynamicBeta(Hyperparameters):
    """The defaults are what the authors of beta-DPO use."""

    tau: float = setting(0.6, "how strongly beta follows the mean gap", at_least=0)
    sample_fraction: float = setting(
        0.8, "share of a micro-batch's pairs that are trained on", above=0, at_most=1
    )
    gap_decay: float = setting(
        0.9, "decay of the gaps' running mean and deviation", at_least=0, below=1
    )
    sampling_seed: int = setting(0, "seed of the draws of pairs", at_least=0)


@dataclass(frozen=True)
class BetaSimpoHyperparameters(DynamicBeta, SimpoHyperparameters):
    pass


@dataclass(frozen=True)
class BetaDpoHyperparameters(DynamicBeta, DpoHyperparameters):
    pass


def initial_state(hp: DynamicBeta) -> State:
    return {
        "mean": torch.zeros((), dtype=torch.float64),
        "std": torch.ones((), dtype=torch.float64),
        "generator": seeded_generator(hp.sampling_seed),
    }


def beta_simpo_terms(pairs: Pairs, hp: BetaSimpoHyperparameters, state: State) -> Terms:
    return _terms(pairs, pairs.means, hp, hp.gamma_beta_ratio, state)


def beta_dpo_terms(pairs: Pairs, hp: BetaDpoHyperparameters, state: State) -> Terms:
    return _terms(pairs, log_ratios(pairs, hp.length_norm), hp, 0.0, state)


def _terms(
    pairs: Pairs,
    scores: Tensor,
    hp: BetaSimpoHyperparameters | BetaDpoHyperparameters,
    ratio: float,
    state: State,
) -> Terms:
    """Terms for ``scores`` [2P], which beta has yet to scale, and the margin's ratio to it."""
    chosen, rejected = scores.chunk(2)
    gaps = chosen - rejected
    beta, weights = torch.full_like(gaps, hp.beta), torch.ones_like(gaps)
    if pairs.training:
        beta, weights, state = drawn(pairs, hp.beta * gaps, hp, state)
        beta, weights = beta.to(gaps.dtype).expand_as(gaps), weights.to(gaps.dtype)
    x = beta * (gaps - ratio) if pairs.margins is None else beta * (gaps - ratio) - pairs.margins
    losses = weights * pair_losses(x, label_smoothing=hp.label_smoothing)
    margins = pairs.widened(beta * ratio)
    return Terms(losses, hp.beta * chosen, hp.beta * rejected, margins, state)


@torch.no_grad()
def drawn(
    pairs: Pairs, gaps: Tensor, hp: BetaSimpoHyperparameters | BetaDpoHyperparameters, state: State
) -> tuple[Tensor, Tensor, State]:
    """beta_used [], the weight of each pair's loss [P], both fp64, and the next state.

    A pair whose gap is not a number is in no draw, but 0 times its loss still shows.
    """
    current = pairs.gather(gaps)
    uniform, generator = draw_uniform(state["generator"], DRAWS, gaps.device)
    zscores = (current.values[:, 0] - state["mean"]) / (state["std"] + _EPS_STD)
    count = current.count.double()
    draws = (count * hp.sample_fraction + 1e-9).floor().clamp(min=1)
    sampled = largest_keys(zscores**2 / -2, uniform, current, draws)
    number = sampled.sum().clamp(min=1)
    sampled_mean = padded_sum(torch.where(sampled, current.values[:, 0], 0.0)) / number
    beta = hp.beta * (1 + hp.tau * (sampled_mean - state["mean"]))
    weights = torch.where(sampled, count / number, 0.0)[current.mine]
    return beta.clamp(min=LEAST_BETA), weights, _updated(current, hp.gap_decay, state, generator)


def largest_keys(log_weights: Tensor, uniform: Tensor, pairs: GlobalPairs, draws: Tensor) -> Tensor:
    """[G] bool: ``draws`` of the pairs, drawn without replacement with these weights.

    The largest of the log-weights, each with Gumbel noise added, are distributed as pairs drawn
    one after the other; weights that underflow keep their order.
    """
    places = torch.arange(len(log_weights), device=log_weights.device)
    noise = -torch.log(-torch.log(uniform))
    keys = (log_weights + noise[places % DRAWS]).masked_fill(~pairs.used, -torch.inf)
    ranks = keys.argsort(descending=True, stable=True).argsort()
    return pairs.used & (ranks < draws)


def _updated(pairs: GlobalPairs, decay: float, state: State, generator: Tensor) -> State:
    """One pair updates the mean and leaves the deviation, which it does not have."""
    updated = {"generator": generator}
    for key, value, needed in (("mean", pairs.mean(), 1), ("std", pairs.std(), 2)):
        running = decay * state[key] + (1 - decay) * value
        updated[key] = torch.where(pairs.count >= needed, running, state[key])
    return updated
