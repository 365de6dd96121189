"""Losses with a reference that compare an answer with those of other pairs: BCO and AOT.

With rewards ``r = beta (s - s_ref)`` of the chosen (w) and rejected (l) answers:

    bco:           -log sigmoid(r_w - d) - log sigmoid(d - r_l)    d: the mean of all rewards so far
    aot:           dpo's loss of the k-th smallest beta (s_w - s_l) less the k-th smallest
                   beta (s_ref_w - s_ref_l), over all k
    aot-unpaired:  dpo's loss of the k-th smallest r_w less the k-th smallest r_l, over all k

BCO, arXiv 2404.04656: its reward shift d, held constant, counts this micro-batch's rewards too and
those of training only. AOT, arXiv 2406.05882. Both take the global micro-batch, so the number of
ranks changes nothing; TRL sorts each rank's pairs alone, and its bco_pair has no shift any more.

AOT's terms are dealt to pairs: to the pair whose chosen answer it has, and in aot-unpaired half of
it to the pair of its rejected answer, with all of that answer's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....kernels.margin_loss.function import pair_losses, softplus
from ..gather import GlobalPairs, padded_sum
from ..settings import LabelSmoothing
from ..terms import ObjectiveSpec, Pairs, State, Terms, constant_margins
from .dpo import ReferenceHyperparameters, log_ratios


@dataclass(frozen=True)
class AotHyperparameters(LabelSmoothing, ReferenceHyperparameters):
    LOSSES_OF_PAIRS = False


def no_rewards_yet(hp: ReferenceHyperparameters) -> State:
    return {name: torch.zeros((), dtype=torch.float64) for name in ("sum", "count")}


def bco_terms(pairs: Pairs, hp: ReferenceHyperparameters, state: State) -> Terms:
    chosen, rejected = (hp.beta * log_ratios(pairs, hp.length_norm)).chunk(2)
    if pairs.training:
        everyone = pairs.gather(torch.stack([chosen, rejected], 1))
        total = padded_sum(everyone.values[:, 0]) + padded_sum(everyone.values[:, 1])
        state = {"sum": state["sum"] + total, "count": state["count"] + 2 * everyone.count}
    shift = (state["sum"] / state["count"].clamp(min=1)).to(chosen.dtype)
    losses = softplus(shift - chosen) + softplus(rejected - shift)
    return Terms(losses, chosen, rejected, constant_margins(pairs, 0.0), state)


def aot_terms(pairs: Pairs, hp: AotHyperparameters, state: State) -> Terms:
    rewards = hp.beta * log_ratios(pairs, hp.length_norm)
    chosen, rejected = rewards.chunk(2)
    reference = _reference_rewards(pairs, hp)
    frozen = reference[0] - reference[1]
    gaps = chosen - rejected + frozen  # the policy's alone
    partner, _ = partners(pairs.gather(torch.stack([gaps, frozen], 1)), gaps.dtype)
    losses = pair_losses(gaps - partner, label_smoothing=hp.label_smoothing)
    return Terms(losses, chosen, rejected, constant_margins(pairs, 0.0))


def aot_unpaired_terms(pairs: Pairs, hp: AotHyperparameters, state: State) -> Terms:
    chosen, rejected = (hp.beta * log_ratios(pairs, hp.length_norm)).chunk(2)
    everyone = pairs.gather(torch.stack([chosen, rejected], 1))
    of_chosen, of_rejected = partners(everyone, chosen.dtype)
    both = pair_losses(chosen - of_chosen, label_smoothing=hp.label_smoothing) + pair_losses(
        of_rejected - rejected, label_smoothing=hp.label_smoothing
    )
    # Half of each term's value, and all of the gradient of the answer that is this pair's own.
    return Terms(both - both.detach() / 2, chosen, rejected, constant_margins(pairs, 0.0))


def _reference_rewards(pairs: Pairs, hp: AotHyperparameters) -> tuple[Tensor, Tensor]:
    assert pairs.reference_sums is not None  # `Objective` has seen to it
    lengths = pairs.lengths.clamp(min=1) if hp.length_norm else 1
    chosen, rejected = (hp.beta * pairs.reference_sums / lengths).chunk(2)
    return chosen, rejected


def partners(everyone: GlobalPairs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each of this rank's pairs [P]: of the two columns, what the other has at its rank."""
    used = everyone.used[:, None]
    ordered, order = everyone.values.masked_fill(~used, torch.inf).sort(dim=0, stable=True)
    ranks = order.argsort(dim=0)
    ordered = torch.where(used, ordered, 0.0)  # a pair in no statistic meets a number all the same
    opposite = torch.stack([ordered[ranks[:, 0], 1], ordered[ranks[:, 1], 0]])
    of_first, of_second = opposite[:, everyone.mine].to(dtype)
    return of_first, of_second


ROWS = {
    "bco": ObjectiveSpec(
        "-log sigmoid(r_w - d) - log sigmoid(d - r_l), d the running mean of rewards",
        ReferenceHyperparameters,
        bco_terms,
        no_rewards_yet,
        couples_pairs=True,
        needs_reference=True,
    ),
    "aot": ObjectiveSpec(
        "dpo's loss of sorted beta (s_w - s_l) less sorted beta (s_ref_w - s_ref_l)",
        AotHyperparameters,
        aot_terms,
        couples_pairs=True,
        needs_reference=True,
    ),
    "aot-unpaired": ObjectiveSpec(
        "dpo's loss of sorted r_w less sorted r_l",
        AotHyperparameters,
        aot_unpaired_terms,
        couples_pairs=True,
        needs_reference=True,
    ),
}
