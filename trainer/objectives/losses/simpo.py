"""SimPO and its relatives: losses of an answer's mean logp, without a reference.

With the gap ``D = beta * (mean_w - mean_l)`` of mean logps and ``g = beta * gamma_beta_ratio``:

    simpo:    -(1 - e) log sigmoid(D - g) - e log sigmoid(g - D)      e = label_smoothing
    hinge:    max(0, 1 - (D - g))
    alphapo:  simpo of rewards ``beta * (1 - p^-alpha) / alpha``      p = exp(mean)
    repo:     max(0, target_margin - (mean_w - mean_l))
    simper:   exp(mean_l) - exp(mean_w)
    sft:      -mean_w

SimPO, arXiv 2405.14734; the hinge form of its trainer is SLiC's, arXiv 2305.10425. AlphaPO, arXiv
2501.03884, is SimPO at alpha 0. RePO, arXiv 2503.07426, is SimPO for an infinite beta. SimPER,
arXiv 2502.00883, has no hyperparameter: its rewards are inverse perplexities. sft is the likelihood
of the chosen answer alone, for mixtures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ....kernels.margin_loss.function import pair_losses
from ..settings import Hyperparameters, LabelSmoothing, setting
from ..terms import Pairs, State, Terms, chosen_nll, constant_margins, margin_terms


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


@dataclass(frozen=True)
class AlphaPoHyperparameters(SimpoHyperparameters):
    alpha: float = setting(
        0.25, "shape of the reward: above 0 it is steeper for improbable answers, 0 is simpo"
    )


@dataclass(frozen=True)
class RepoHyperparameters(Hyperparameters):
    target_margin: float = setting(
        0.5, "gap of mean logps from which a pair is left alone, gamma", at_least=0
    )


class SftHyperparameters(Hyperparameters):
    LIKELIHOOD = True


def simpo_terms(pairs: Pairs, hp: SimpoHyperparameters, state: State) -> Terms:
    margins = constant_margins(pairs, hp.gamma)
    return margin_terms(pairs, hp.beta, margins, label_smoothing=hp.label_smoothing)


def hinge_terms(pairs: Pairs, hp: MarginHyperparameters, state: State) -> Terms:
    return margin_terms(pairs, hp.beta, constant_margins(pairs, hp.gamma), kind="hinge")


def alphapo_terms(pairs: Pairs, hp: AlphaPoHyperparameters, state: State) -> Terms:
    rewards = pairs.means
    if hp.alpha:
        largest = 0.9 * math.log(torch.finfo(rewards.dtype).max)  # beyond, the reward is flat
        rewards = -torch.expm1((-hp.alpha * rewards).clamp(max=largest)) / hp.alpha
    chosen, rejected = (hp.beta * rewards).chunk(2)
    losses = pair_losses(chosen - rejected - hp.gamma, label_smoothing=hp.label_smoothing)
    return Terms(losses, chosen, rejected, constant_margins(pairs, hp.gamma))


def repo_terms(pairs: Pairs, hp: RepoHyperparameters, state: State) -> Terms:
    chosen, rejected = pairs.means.chunk(2)
    losses = (hp.target_margin - (chosen - rejected)).relu()
    return Terms(losses, chosen, rejected, constant_margins(pairs, hp.target_margin))


def simper_terms(pairs: Pairs, hp: Hyperparameters, state: State) -> Terms:
    chosen, rejected = pairs.means.exp().chunk(2)
    return Terms(rejected - chosen, chosen, rejected, constant_margins(pairs, 0.0))


def sft_terms(pairs: Pairs, hp: SftHyperparameters, state: State) -> Terms:
    chosen, rejected = pairs.means.chunk(2)
    return Terms(chosen_nll(pairs, hp.nll), chosen, rejected, constant_margins(pairs, 0.0))
