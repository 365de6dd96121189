"""Losses of a pair's two rewards under a reference model: one function and one row each.

With the rewards ``w`` and ``l`` of the chosen and the rejected answer, ``beta`` times `dpo.scores`,
``D = w - l`` and ``e = label_smoothing``:

    dpo-hinge:  max(0, 1 - D)                                  SLiC, arXiv 2305.10425
    dpo-norm:   dpo of rewards per token                       TRL's sigmoid_norm
    robust:     (dpo's (1-e) term - its e term) / (1 - 2e)     robust DPO, arXiv 2403.00409
    exo:        KL of (sigmoid(D), sigmoid(-D)) from (1-e, e)  EXO, arXiv 2402.00856, eq. 16
    nca-pair:   -log s(w) - (log s(-w) + log s(-l)) / 2        NCA, arXiv 2402.05369
    bco-pair:   -log s(w) - log s(-l)                          BCO without its shift, see `bco`
    sppo:       ((w - 1/2)^2 + (l + 1/2)^2) / beta^2           SPPO, arXiv 2405.00675, hard labels
    apo-zero:   1 - s(w) + s(l)                                APO, arXiv 2408.06266, eq. 7
    apo-down:   s(w) + 1 - s(D)                                eq. 8
    discopop:   -log s(D) (1 - m) + exp(-D) m, m = s(D / tau)  DiscoPOP, arXiv 2406.08414, eq. 5

s is the logistic function. All are TRL's of these names. Those that know no more of a pair than D
take another divergence than the reverse KL (`dpo.Divergence`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....kernels.margin_loss.function import pair_losses, softplus
from ..settings import setting
from ..terms import ObjectiveSpec, Pairs, State, Terms, constant_margins
from .dpo import Divergence, DivergenceDpoHyperparameters, ReferenceHyperparameters, scores

Losses = Callable[[Tensor, Tensor, Any], Tensor]
"""Chosen rewards [P], rejected rewards [P] and hyperparameters to losses [P]."""


@dataclass(frozen=True)
class NormedDpoHyperparameters(DivergenceDpoHyperparameters):
    length_norm: bool = setting(True, "take logps per token rather than summed")


@dataclass(frozen=True)
class RobustHyperparameters(Divergence):
    label_smoothing: float = setting(
        0.0, "assumed probability that a pair's label is wrong", at_least=0, below=0.5
    )


@dataclass(frozen=True)
class ExoHyperparameters(Divergence):
    label_smoothing: float = setting(
        1e-3, "probability that the target leaves to the rejected answer", above=0, at_most=0.5
    )


@dataclass(frozen=True)
class DiscopopHyperparameters(Divergence):
    discopop_tau: float = setting(
        0.05, "temperature of the blend of logistic and exponential loss", above=0, at_most=1
    )


def hinge(chosen: Tensor, rejected: Tensor, hp: Divergence) -> Tensor:
    return pair_losses(chosen - rejected, "hinge")


def logistic(chosen: Tensor, rejected: Tensor, hp: DivergenceDpoHyperparameters) -> Tensor:
    return pair_losses(chosen - rejected, label_smoothing=hp.label_smoothing)


def robust(chosen: Tensor, rejected: Tensor, hp: RobustHyperparameters) -> Tensor:
    e, gaps = hp.label_smoothing, chosen - rejected
    return ((1 - e) * softplus(-gaps) - e * softplus(gaps)) / (1 - 2 * e)


def exo(chosen: Tensor, rejected: Tensor, hp: ExoHyperparameters) -> Tensor:
    e, gaps = hp.label_smoothing, chosen - rejected
    wins = gaps.sigmoid() * (-softplus(-gaps) - math.log1p(-e))
    return wins + (-gaps).sigmoid() * (-softplus(gaps) - math.log(e))


def nca(chosen: Tensor, rejected: Tensor, hp: ReferenceHyperparameters) -> Tensor:
    return softplus(-chosen) + (softplus(chosen) + softplus(rejected)) / 2


def bco(chosen: Tensor, rejected: Tensor, hp: ReferenceHyperparameters) -> Tensor:
    return softplus(-chosen) + softplus(rejected)


def sppo(chosen: Tensor, rejected: Tensor, hp: ReferenceHyperparameters) -> Tensor:
    return ((chosen - 0.5) ** 2 + (rejected + 0.5) ** 2) / hp.beta**2


def apo_zero(chosen: Tensor, rejected: Tensor, hp: ReferenceHyperparameters) -> Tensor:
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, hp: ReferenceHyperparameters) -> Tensor:
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def discopop(chosen: Tensor, rejected: Tensor, hp: DiscopopHyperparameters) -> Tensor:
    gaps = chosen - rejected
    sharp = gaps / hp.discopop_tau
    # exp(-D) times its share as one exponential, which does not overflow where D is negative.
    return softplus(-gaps) * (-sharp).sigmoid() + torch.exp(-gaps - softplus(-sharp))


def reward_terms(losses: Losses, pairs: Pairs, hp: Any, state: State) -> Terms:
    chosen, rejected = (hp.beta * scores(pairs, hp)).chunk(2)
    return Terms(losses(chosen, rejected, hp), chosen, rejected, constant_margins(pairs, 0.0))


def _row(
    losses: Losses, formula: str, kind: type[ReferenceHyperparameters] = ReferenceHyperparameters
) -> ObjectiveSpec:
    return ObjectiveSpec(formula, kind, partial(reward_terms, losses), needs_reference=True)


ROWS = {
    "dpo-hinge": _row(hinge, "max(0, 1 - R)", Divergence),
    "dpo-norm": _row(logistic, "-log sigmoid(R), R per token", NormedDpoHyperparameters),
    "robust": _row(
        robust,
        "(-(1-e) log sigmoid(R) + e log sigmoid(-R)) / (1 - 2e)",
        RobustHyperparameters,
    ),
    "exo": _row(exo, "KL((sigmoid(R), sigmoid(-R)) || (1-e, e))", ExoHyperparameters),
    "nca-pair": _row(nca, "-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2"),
    "bco-pair": _row(bco, "-log sigmoid(r_w) - log sigmoid(-r_l)"),
    "sppo": _row(sppo, "((r_w - 1/2)^2 + (r_l + 1/2)^2) / beta^2"),
    "apo-zero": _row(apo_zero, "1 - sigmoid(r_w) + sigmoid(r_l)"),
    "apo-down": _row(apo_down, "sigmoid(r_w) + 1 - sigmoid(R)"),
    "discopop": _row(
        discopop,
        "-log sigmoid(R) (1 - m) + exp(-R) m, m = sigmoid(R / tau)",
        DiscopopHyperparameters,
    ),
}
