"""ORPO, arXiv 2403.07691: likelihood of the chosen answer and an odds ratio, without a reference.

    loss = nll - alpha * log sigmoid(log_odds(mean_w) - log_odds(mean_l))
    log_odds(x) = log(p / (1 - p)),  p = exp(x), the geometric mean of the tokens' probabilities

nll is -mean_w, see `chosen_nll`.

alpha is the paper's lambda, and what TRL calls beta; the loss has no other scale, so there is no
``beta`` here and rewards are reported as ``alpha * mean``, like TRL's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels.margin_loss.function import pair_losses
from ..settings import Hyperparameters, setting
from ..terms import Pairs, State, Terms, chosen_nll, constant_margins


@dataclass(frozen=True)
class OrpoHyperparameters(Hyperparameters):
    """The default is TRL's, and of the size the paper uses."""

    LIKELIHOOD = True

    alpha: float = setting(0.1, "weight of the odds ratio, lambda", above=0)


def orpo_terms(pairs: Pairs, hp: OrpoHyperparameters, state: State) -> Terms:
    chosen, rejected = pairs.means.chunk(2)
    chosen_odds, rejected_odds = log_odds(pairs.means).chunk(2)
    losses = hp.alpha * pair_losses(chosen_odds - rejected_odds) + chosen_nll(pairs, hp.nll)
    return Terms(losses, hp.alpha * chosen, hp.alpha * rejected, constant_margins(pairs, 0.0))


def log_odds(mean_logps: Tensor) -> Tensor:
    """``x - log(1 - exp(x))`` for x <= 0, to full precision at both ends.

    Where ``1 - exp(x)`` is less than the dtype can tell from 0 (an answer that is certain, or
    empty) it stays there, without a gradient: the odds are infinite, and their slope too.
    """
    x = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    near_zero = torch.log(-torch.expm1(x))
    far = torch.log1p(-torch.exp(x))
    return x - torch.where(x > -math.log(2), near_zero, far)
