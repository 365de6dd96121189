"""DPO and its relatives: rewards are log-ratios to a frozen reference model.

With ``rho = s - s_ref`` of a completion's summed logps, or of its mean logps with ``length_norm``,
and the gap ``D = beta * (rho_w - rho_l)``:

    dpo:    -(1 - e) log sigmoid(D) - e log sigmoid(-D)             e = label_smoothing
    r-dpo:  the same of D + alpha * (n_w - n_l)                     n: tokens
    ipo:    (rho_w - rho_l - 1 / (2 * beta))^2

DPO, arXiv 2305.18290; its smoothing is that of conservative DPO. R-DPO, arXiv 2403.19159: a longer
chosen answer needs less of a gap. (gamma-PO's released trainer takes batch sizes for the lengths.)
IPO, arXiv 2310.12036: its per-token form, which its authors advise over sums, is the default here.

f-DPO, arXiv 2309.16240: another divergence from the reference than the reverse KL gives an answer
the score ``f'(exp(rho))`` in place of rho, see `scores`. Other losses of these rewards are in
`reward_losses`.

Shapes: P pairs of this rank; sequences are P chosen, then P rejected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels.margin_loss.function import pair_losses, softplus
from ...errors import UserError
from ..settings import Hyperparameters, LabelSmoothing, setting
from ..terms import Pairs, State, Terms, constant_margins


@dataclass(frozen=True)
class ReferenceHyperparameters(Hyperparameters):
    """Of objectives with a reference model. A beta of 0.1 is what DPO, IPO and KTO start from."""

    beta: float = setting(0.1, "scale of the rewards", above=0)
    length_norm: bool = setting(False, "take logps per token rather than summed")
    ld_alpha: float = setting(
        1.0,
        "weight in sums of the tokens past the length of the pair's shorter answer (LD-DPO)",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True)
class Divergence(ReferenceHyperparameters):
    """Of objectives that know a pair by the difference of its two rewards alone."""

    f_divergence_type: str = setting(
        "reverse_kl",
        "the divergence from the reference whose slope is an answer's score",
        choices=("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = setting(0.5, "alpha of alpha_divergence; at 1 reverse_kl")

    def __post_init__(self) -> None:
        super().__post_init__()
        default = type(self).f_alpha_divergence_coef
        if self.f_alpha_divergence_coef != default and self.f_divergence_type[:5] != "alpha":
            raise UserError(
                "f_alpha_divergence_coef: set f_divergence_type: alpha_divergence beside it; "
                f"{self.f_divergence_type} has no alpha"
            )


@dataclass(frozen=True)
class DpoHyperparameters(LabelSmoothing, ReferenceHyperparameters):
    pass


@dataclass(frozen=True)
class DivergenceDpoHyperparameters(Divergence, DpoHyperparameters):
    pass


@dataclass(frozen=True)
class RdpoHyperparameters(DpoHyperparameters):
    """With alpha 0.01, a hundred tokens more of chosen answer count as a gap of 1."""

    alpha: float = setting(0.01, "what a token of length difference counts as gap", at_least=0)


@dataclass(frozen=True)
class IpoHyperparameters(Divergence):
    length_norm: bool = setting(True, "take logps per token rather than summed")


def log_ratios(pairs: Pairs, length_norm: bool) -> Tensor:
    """rho [2P], differentiable: of whole completions, or per token."""
    assert pairs.reference_sums is not None  # `Objective` has seen to it
    ratios = pairs.sums - pairs.reference_sums
    return ratios / pairs.lengths.clamp(min=1) if length_norm else ratios


def scores(pairs: Pairs, hp: ReferenceHyperparameters) -> Tensor:
    """[2P], differentiable: the slope of hp's divergence at each answer's likelihood ratio.

    That is rho itself for the reverse KL, which is all that an ``hp`` without `Divergence` knows.
    Per token with ``length_norm``: the slope at the whole answer's ratio, divided by its length.
    """
    rho = log_ratios(pairs, False)
    if isinstance(hp, Divergence):
        rho = slope(rho, hp.f_divergence_type, hp.f_alpha_divergence_coef)
    return rho / pairs.lengths.clamp(min=1) if hp.length_norm else rho


def slope(rho: Tensor, divergence: str, alpha: float) -> Tensor:
    """``f'(exp(rho))`` of a divergence, up to its constant factor.

    Exponents stay below what the dtype can hold; beyond, the slope is flat.
    """
    largest = 0.9 * math.log(torch.finfo(rho.dtype).max)
    if divergence == "forward_kl":
        return -torch.expm1((-rho).clamp(max=largest))
    if divergence == "js_divergence":
        return math.log(2) - softplus(-rho)
    if divergence == "alpha_divergence" and alpha != 1:
        return torch.expm1(((alpha - 1) * rho).clamp(max=largest)) / (alpha - 1)
    return rho


def dpo_terms(pairs: Pairs, hp: DpoHyperparameters, state: State) -> Terms:
    rewards = hp.beta * scores(pairs, hp)
    margins = pairs.widened(constant_margins(pairs, 0.0))
    return reward_terms(rewards, margins, hp.label_smoothing)


def rdpo_terms(pairs: Pairs, hp: RdpoHyperparameters, state: State) -> Terms:
    rewards = hp.beta * log_ratios(pairs, hp.length_norm)
    chosen_lengths, rejected_lengths = pairs.lengths.chunk(2)
    margins = hp.alpha * (rejected_lengths - chosen_lengths).to(rewards.dtype)
    return reward_terms(rewards, pairs.widened(margins), hp.label_smoothing)


def ipo_terms(pairs: Pairs, hp: IpoHyperparameters, state: State) -> Terms:
    chosen, rejected = scores(pairs, hp).chunk(2)
    losses = (chosen - rejected - 1 / (2 * hp.beta)) ** 2
    # The target 1 / (2 beta) is one half in units of the reward.
    return Terms(losses, hp.beta * chosen, hp.beta * rejected, constant_margins(pairs, 0.5))


def reward_terms(
    rewards: Tensor, target_margins: Tensor, label_smoothing: float, state: State | None = None
) -> Terms:
    """Terms of the logistic loss of ``rewards`` [2P] with these target margins [P]."""
    chosen, rejected = rewards.chunk(2)
    target_margins = target_margins.to(rewards.dtype)
    losses = pair_losses(chosen - rejected - target_margins, label_smoothing=label_smoothing)
    return Terms(losses, chosen, rejected, target_margins, state)
