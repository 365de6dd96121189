"""SimPO, arXiv 2405.14734, and the hinge form of its trainer (SLiC, arXiv 2305.10425).

With the gap ``D = beta * (mean_w - mean_l)`` of mean logps and ``g = beta * gamma_beta_ratio``:

    simpo:  -(1 - e) log sigmoid(D - g) - e log sigmoid(g - D)      e = label_smoothing
    hinge:  max(0, 1 - (D - g))
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Pairs, Terms, constant_margins, margin_terms
from .settings import Hyperparameters, LabelSmoothing, setting
from .state import State


@dataclass(frozen=True)
class MarginHyperparameters(Hyperparameters):
    """Of reference-free objectives with a target margin.

    The defaults are where SimPO's authors suggest to start a search: beta 2 to 2.5 and a ratio of
    0.5. (Their released class says 0.25.)
    """

    beta: float = setting(2.0, "scale of the rewards", above=0)
    gamma_beta_ratio: float = setting(0.5, "target margin divided by beta", at_least=0)

    @property
    def gamma(self) -> float:
        """The target margin, in units of the reward."""
        return self.beta * self.gamma_beta_ratio


@dataclass(frozen=True)
class SimpoHyperparameters(LabelSmoothing, MarginHyperparameters):
    pass


def simpo_terms(pairs: Pairs, hp: SimpoHyperparameters, state: State) -> Terms:
    margins = constant_margins(pairs, hp.gamma)
    return margin_terms(pairs, hp.beta, margins, label_smoothing=hp.label_smoothing)


def hinge_terms(pairs: Pairs, hp: MarginHyperparameters, state: State) -> Terms:
    return margin_terms(pairs, hp.beta, constant_margins(pairs, hp.gamma), kind="hinge")
