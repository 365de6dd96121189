"""Losses of all answers to a prompt at once, from the scores that the data give them.

With the rewards ``r_i`` of a prompt's n answers, beta times ``s - s_ref`` of their summed logps (or
of their means with ``length_norm``), and their scores ``psi_i``:

    infonca:        -sum_i softmax(psi / a)_i log softmax(r)_i
    nca:            -sum_i [softmax(psi / a)_i log sigmoid(r_i) + log sigmoid(-r_i) / n]
    plackett-luce:  sum_i [log sum_{j: psi_j <= psi_i} exp(r_j) - r_i]
    lipo:           sum_{psi_i > psi_j} |G_i - G_j| |1/D_i - 1/D_j| log(1 + exp(r_j - r_i))

InfoNCA and NCA, arXiv 2402.05369: a is ``score_temperature``; as it goes to 0 the
best answer's weight goes to 1, and of two answers they become dpo and nca-pair. Plackett-Luce is
DPO's form for rankings, arXiv 2305.18290, appendix A.3; answers of equal scores compete with each
other, as Breslow has ties. LiPO-lambda, arXiv 2402.01878: gains ``G = 2^psi - 1``, psi being
``score_scale`` times the score, and discounts ``D = log(1 + rank)`` by the rewards, the highest of
which has rank 1; weights are held constant. Rewards that are equal, as all are before the first
step, rank by score.

Without a reference, ``p_i`` an answer's mean logp and ``nll`` minus that of the best:

    rrhf:  sum_{psi_i < psi_j} max(0, p_i - p_j) + w nll
    pro:   sum_k log[1 + sum_{j: psi_j < psi_k} exp(T_kj r_j - T_k r_k)] + w (n - 1)^2 nll

RRHF, arXiv 2304.05302: ``p`` is the sum over ``length^length_penalty``, and w
``likelihood_weight``. PRO, arXiv 2306.17492: ``r = beta p``, ``T_kj`` the gap
``psi_k - psi_j`` and ``T_k`` the largest of them.

Each has one term per answer, whose sum over a list is the prompt's loss. The loss of a step is the
mean over its prompts; a pair carries an equal share of its prompt's.

Shapes: S answers, see `Lists`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....kernels.margin_loss.function import softplus
from ...errors import UserError
from ..lists import Lists, apart, masked_logsumexp
from ..settings import Hyperparameters, setting
from ..terms import ObjectiveSpec, Pairs, State, Terms, by_edges, constant_margins

ListLosses = Callable[[Lists, Tensor, Any], Tensor]
"""Lists, rewards [S] and hyperparameters to the terms [S] of the lists' losses."""


@dataclass(frozen=True)
class ListHyperparameters(Hyperparameters):
    LOSSES_OF_PAIRS = False

    def __post_init__(self) -> None:
        if self.nll != "answers":
            raise UserError(
                "nll: leave it at answers; a listwise objective averages the likelihood of each "
                "prompt's best answer"
            )
        super().__post_init__()


@dataclass(frozen=True)
class RankingHyperparameters(ListHyperparameters):
    """Of those with a reference model; the default beta is DPO's."""

    beta: float = setting(0.1, "scale of the rewards", above=0)
    length_norm: bool = setting(False, "take logps per token rather than summed")


@dataclass(frozen=True)
class ContrastHyperparameters(RankingHyperparameters):
    """The default beta is that of the published runs."""

    beta: float = setting(0.01, "scale of the rewards", above=0)
    score_temperature: float = setting(
        1.0, "divides scores before the softmax that makes weights of them, alpha", above=0
    )


@dataclass(frozen=True)
class LipoHyperparameters(RankingHyperparameters):
    score_scale: float = setting(
        1.0, "multiplies scores before gains of 2 to their power are taken", above=0
    )


@dataclass(frozen=True)
class RrhfHyperparameters(ListHyperparameters):
    """The defaults are the paper's; its released script has a likelihood_weight of 0.01."""

    LIKELIHOOD = True

    likelihood_weight: float = setting(1.0, "weight of the best answer's likelihood", at_least=0)
    length_penalty: float = setting(
        1.0, "power of its length that an answer's summed logp is divided by", at_least=0
    )


@dataclass(frozen=True)
class ProHyperparameters(ListHyperparameters):
    """The default weight is the paper's."""

    LIKELIHOOD = True

    beta: float = setting(1.0, "scale of the rewards", above=0)
    likelihood_weight: float = setting(
        0.05, "weight of the best answer's likelihood, times (answers - 1)^2", at_least=0
    )


def infonca(lists: Lists, rewards: Tensor, hp: ContrastHyperparameters) -> Tensor:
    return -_weights(lists, hp) * lists.log_softmax(rewards)


def nca(lists: Lists, rewards: Tensor, hp: ContrastHyperparameters) -> Tensor:
    return _weights(lists, hp) * softplus(-rewards) + softplus(rewards) / lists.count


def _weights(lists: Lists, hp: ContrastHyperparameters) -> Tensor:
    return lists.log_softmax(lists.scores / hp.score_temperature).exp()


def plackett_luce(lists: Lists, rewards: Tensor, hp: RankingHyperparameters) -> Tensor:
    no_better = lists.together & ~lists.better.T
    return masked_logsumexp(rewards, no_better) - rewards


def lipo(lists: Lists, rewards: Tensor, hp: LipoHyperparameters) -> Tensor:
    gains = torch.exp2(hp.score_scale * lists.scores)
    discounts = 1 / torch.log1p(_ranks(lists, rewards.detach()))
    weights = apart(gains).abs() * apart(discounts).abs()
    return torch.where(lists.better, weights * softplus(-apart(rewards)), 0.0).sum(1)


def _ranks(lists: Lists, rewards: Tensor) -> Tensor:
    """[S] from 1, the highest reward's; by score where rewards are equal, and then by place."""
    places = torch.arange(len(rewards), device=rewards.device)
    tied = apart(rewards) == 0
    before = tied & (lists.better | ((apart(lists.scores) == 0) & (apart(places) < 0)))
    ahead = lists.together & ((apart(rewards) > 0) | before)  # the first, of the second
    return 1 + ahead.sum(0).to(rewards.dtype)


def rrhf(lists: Lists, rewards: Tensor, hp: RrhfHyperparameters) -> Tensor:
    hinges = torch.where(lists.better, (-apart(rewards)).relu(), 0.0).sum(1)
    return hinges + hp.likelihood_weight * lists.nll_of_best()


def pro(lists: Lists, rewards: Tensor, hp: ProHyperparameters) -> Tensor:
    gaps = apart(lists.scores)
    largest = torch.where(lists.better, gaps, 0.0).amax(1) if len(gaps) else lists.scores
    worse = torch.where(lists.better, gaps * rewards, -torch.inf)
    own = (largest * rewards)[:, None]
    losses = torch.cat([own, worse], 1).logsumexp(1) - own[:, 0]
    others = (lists.count - 1).to(rewards.dtype)
    return losses + hp.likelihood_weight * others**2 * lists.nll_of_best()


def _relative_rewards(lists: Lists, hp: RankingHyperparameters) -> Tensor:
    assert lists.reference_sums is not None  # `Objective` has seen to it
    ratios = lists.sums - lists.reference_sums
    return hp.beta * (ratios / lists.lengths.clamp(min=1) if hp.length_norm else ratios)


def _length_penalized(lists: Lists, hp: RrhfHyperparameters) -> Tensor:
    return lists.sums / lists.lengths.clamp(min=1).to(lists.sums.dtype) ** hp.length_penalty


def _scaled_means(lists: Lists, hp: ProHyperparameters) -> Tensor:
    return hp.beta * lists.means


def list_terms(
    losses: ListLosses,
    rewards_of: Callable[[Lists, Any], Tensor],
    pairs: Pairs,
    hp: Any,
    state: State,
) -> Terms:
    lists = pairs.lists
    assert lists is not None  # `Objective` has seen to it
    rewards = rewards_of(lists, hp)
    chosen, rejected = by_edges(rewards, lists.edges).chunk(2)
    margins = constant_margins(pairs, 0.0)
    return Terms(lists.dealt(losses(lists, rewards, hp)), chosen, rejected, margins)


def _row(
    losses: ListLosses,
    formula: str,
    kind: type[ListHyperparameters],
    rewards_of: Callable[[Lists, Any], Tensor] = _relative_rewards,
) -> ObjectiveSpec:
    return ObjectiveSpec(
        formula,
        kind,
        partial(list_terms, losses, rewards_of),
        needs_reference=rewards_of is _relative_rewards,
        takes=("scored",),
    )


ROWS = {
    "infonca": _row(
        infonca, "-sum_i softmax(score / a)_i log softmax(r)_i", ContrastHyperparameters
    ),
    "nca": _row(
        nca,
        "-sum_i (softmax(score / a)_i log sigmoid(r_i) + log sigmoid(-r_i) / n)",
        ContrastHyperparameters,
    ),
    "plackett-luce": _row(
        plackett_luce,
        "sum_i (log sum_{j no better than i} exp(r_j) - r_i)",
        RankingHyperparameters,
    ),
    "lipo": _row(
        lipo,
        "sum_{i better than j} |G_i - G_j| |1/D_i - 1/D_j| log(1 + exp(r_j - r_i))",
        LipoHyperparameters,
    ),
    "rrhf": _row(
        rrhf,
        "sum_{j better than i} max(0, p_i - p_j) - w mean_best",
        RrhfHyperparameters,
        _length_penalized,
    ),
    "pro": _row(
        pro,
        "sum_k log(1 + sum_{j worse} exp(T_kj r_j - T_k r_k)) - w (n - 1)^2 mean_best",
        ProHyperparameters,
        _scaled_means,
    ),
}
