"""KTO, arXiv 2402.01306, eq. 7: each answer against what answers gain on average.

With ``rho = s - s_ref`` (per token with ``length_norm``), each answer has the loss

    desirable:    w_d (1 - sigmoid(beta * (rho - KL)))
    undesirable:  w_u (1 - sigmoid(beta * (KL - rho)))

where KL, at least 0 and held constant, is the mean over the global micro-batch of the answers' own
rho (``kl_estimate`` batch), or of those of answers to other prompts (mismatched: as in the paper,
and in TRL). apo-zero-unpaired, arXiv 2408.06266, is the same with a KL of 0, as TRL has it.

On pairs, as gamma-PO's trainer has it, but with the KL of all ranks' pairs rather than of each
rank's: a pair's loss is the mean of its answers', the chosen one's with KL_l, the mean of all
rho_l, and the rejected one's with KL_w.

In the log a single answer is a pair with the *reference point* beta * KL: the reward of a desirable
answer should be above it, and that of an undesirable one below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import UserError
from ..settings import Hyperparameters, setting
from ..terms import Pairs, State, Terms, constant_margins
from .dpo import ReferenceHyperparameters, log_ratios


@dataclass(frozen=True)
class LabelledHyperparameters(Hyperparameters):
    LOSSES_OF_PAIRS = False

    beta: float = setting(0.1, "scale of the rewards", above=0)
    length_norm: bool = setting(False, "take logps per token rather than summed")
    desirable_weight: float = setting(1.0, "weight of desirable answers' losses", at_least=0)
    undesirable_weight: float = setting(1.0, "weight of undesirable answers' losses", at_least=0)


@dataclass(frozen=True)
class KtoHyperparameters(ReferenceHyperparameters):
    desirable_weight: float = setting(1.0, "weight of desirable answers' losses", at_least=0)
    undesirable_weight: float = setting(1.0, "weight of undesirable answers' losses", at_least=0)
    kl_estimate: str = setting(
        "batch",
        "answers whose mean log-ratio is the KL: those of the batch, or of other prompts",
        choices=("batch", "mismatched"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_estimate == "mismatched" and self.length_norm:
            raise UserError(
                "length_norm: leave it out, or set kl_estimate: batch; mismatched answers are "
                "compared in sums"
            )


def kto_terms(pairs: Pairs, hp: KtoHyperparameters, state: State) -> Terms:
    chosen, rejected = log_ratios(pairs, hp.length_norm).chunk(2)
    if pairs.labels is not None:
        gained = chosen if pairs.mismatched is None else pairs.mismatched
        return labelled_terms(pairs, hp, chosen, pairs.gather(gained).mean().clamp(min=0))
    if hp.kl_estimate == "mismatched":
        raise UserError("kl_estimate: set it to batch; pairs have no mismatched answers")
    everyone = pairs.gather(torch.stack([chosen, rejected], 1))
    kl_chosen, kl_rejected = (everyone.mean(side).clamp(min=0) for side in (0, 1))
    losses = (
        hp.desirable_weight * torch.sigmoid(hp.beta * (kl_rejected - chosen))
        + hp.undesirable_weight * torch.sigmoid(hp.beta * (rejected - kl_chosen))
    ) / 2
    return Terms(losses, hp.beta * chosen, hp.beta * rejected, constant_margins(pairs, 0.0))


def apo_zero_unpaired_terms(pairs: Pairs, hp: LabelledHyperparameters, state: State) -> Terms:
    ratios = log_ratios(pairs, hp.length_norm).chunk(2)[0]
    return labelled_terms(pairs, hp, ratios, ratios.new_zeros(()))


def labelled_terms(
    pairs: Pairs, hp: LabelledHyperparameters | KtoHyperparameters, ratios: Tensor, kl: Tensor
) -> Terms:
    """Terms of single answers with log-``ratios`` [P] against a ``kl`` []."""
    assert pairs.labels is not None  # `Objective` has seen to it
    rewards, point = hp.beta * ratios, (hp.beta * kl).to(ratios.dtype).expand_as(ratios)
    above = torch.where(pairs.labels, rewards, point)
    below = torch.where(pairs.labels, point, rewards)
    both = (ratios.new_full((), w) for w in (hp.desirable_weight, hp.undesirable_weight))
    losses = torch.where(pairs.labels, *both) * torch.sigmoid(below - above)
    return Terms(losses, above, below, constant_margins(pairs, 0.0))
