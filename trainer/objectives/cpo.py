"""CPO, arXiv 2401.08417: DPO with a uniform reference, and a likelihood term beside it.

    loss = -log sigmoid(beta * (s_w - s_l)) - alpha * mean_w

with s the summed logps, or the mean ones with ``length_norm``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.margin_loss.function import pair_losses
from .base import Pairs, Terms, constant_margins
from .settings import Hyperparameters, setting
from .state import State


@dataclass(frozen=True)
class CpoHyperparameters(Hyperparameters):
    """The defaults are the paper's: beta 0.1, and the likelihood term as it is."""

    beta: float = setting(0.1, "scale of the rewards", above=0)
    alpha: float = setting(1.0, "weight of the chosen answer's likelihood", at_least=0)
    length_norm: bool = setting(False, "take logps per token rather than summed")


def cpo_terms(pairs: Pairs, hp: CpoHyperparameters, state: State) -> Terms:
    chosen, rejected = (hp.beta * (pairs.means if hp.length_norm else pairs.sums)).chunk(2)
    losses = pair_losses(chosen - rejected) - hp.alpha * pairs.means.chunk(2)[0]
    return Terms(losses, chosen, rejected, constant_margins(pairs, 0.0))
