"""KTO, arXiv 2402.01306, eq. 7, on pairs: each answer against what the others gain on average.

With ``rho = s - s_ref`` (per token with ``length_norm``) and KL_w, KL_l the means of rho_w and of
rho_l over the global micro-batch, at least 0 and held constant:

    loss = (1 - sigmoid(beta * (rho_w - KL_l)) + 1 - sigmoid(beta * (KL_w - rho_l))) / 2

as gamma-PO's trainer pairs them, but with the KL of all ranks' pairs rather than of each rank's.
"""

from __future__ import annotations

import torch

from ..terms import Pairs, State, Terms, constant_margins
from .dpo import ReferenceHyperparameters, log_ratios


def kto_terms(pairs: Pairs, hp: ReferenceHyperparameters, state: State) -> Terms:
    chosen, rejected = log_ratios(pairs, hp.length_norm).chunk(2)
    everyone = pairs.gather(torch.stack([chosen, rejected], 1))
    kl_chosen, kl_rejected = (everyone.mean(side).clamp(min=0) for side in (0, 1))
    losses = (
        torch.sigmoid(hp.beta * (kl_rejected - chosen))
        + torch.sigmoid(hp.beta * (rejected - kl_chosen))
    ) / 2
    return Terms(losses, hp.beta * chosen, hp.beta * rejected, constant_margins(pairs, 0.0))
