"""CPO, arXiv 2401.08417: DPO with a uniform reference, and a likelihood term beside it.

With the rewards ``w`` and ``l``, beta times the summed logps of the answers, or times the mean ones
with ``length_norm``, ``nll`` minus the chosen mean logp, see `chosen_nll`, and ``e`` the label
smoothing:

    cpo:        -(1 - e) log sigmoid(w - l) - e log sigmoid(l - w) + alpha * nll
    cpo-hinge:  max(0, 1 - (w - l)) + alpha * nll                TRL's loss_type: hinge
    cpo-ipo:    ((w - l) / beta - 1 / (2 * beta))^2 + alpha * nll     TRL's ipo, of mean logps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ....kernels.margin_loss.function import pair_losses
from ..settings import Hyperparameters, LabelSmoothing, setting
from ..terms import Pairs, State, Terms, chosen_nll, constant_margins


@dataclass(frozen=True)
class CpoHyperparameters(Hyperparameters):
    """The defaults are the paper's: beta 0.1, and the likelihood term as it is."""

    LIKELIHOOD = True

    beta: float = setting(0.1, "scale of the rewards", above=0)
    alpha: float = setting(1.0, "weight of the chosen answer's likelihood", at_least=0)
    length_norm: bool = setting(False, "take logps per token rather than summed")


@dataclass(frozen=True)
class SmoothedCpoHyperparameters(LabelSmoothing, CpoHyperparameters):
    pass


@dataclass(frozen=True)
class CpoIpoHyperparameters(CpoHyperparameters):
    length_norm: bool = setting(True, "take logps per token rather than summed")


def cpo_terms(pairs: Pairs, hp: SmoothedCpoHyperparameters, state: State) -> Terms:
    e = hp.label_smoothing
    return _terms(pairs, hp, lambda gaps: pair_losses(gaps, label_smoothing=e))


def cpo_hinge_terms(pairs: Pairs, hp: CpoHyperparameters, state: State) -> Terms:
    return _terms(pairs, hp, lambda gaps: pair_losses(gaps, "hinge"))


def cpo_ipo_terms(pairs: Pairs, hp: CpoHyperparameters, state: State) -> Terms:
    return _terms(pairs, hp, lambda gaps: ((gaps - 0.5) / hp.beta) ** 2, target=0.5)


def _terms(
    pairs: Pairs,
    hp: CpoHyperparameters,
    losses: Callable[[Tensor], Tensor],
    target: float = 0.0,
) -> Terms:
    """Terms of ``losses`` of the gaps of rewards [P], and of the likelihood."""
    chosen, rejected = (hp.beta * (pairs.means if hp.length_norm else pairs.sums)).chunk(2)
    total = losses(chosen - rejected) + hp.alpha * chosen_nll(pairs, hp.nll)
    return Terms(total, chosen, rejected, constant_margins(pairs, target))
