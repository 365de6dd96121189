"""Loss names that libraries share and mean differently: asked about, never guessed.

Must run on the settings as they were given, before `translation` renames their keys.
"""

from __future__ import annotations

from ...errors import UserError
from .keys import Settings

MEANINGS = {
    "sigmoid": "objective: simpo (SimPO's), dpo (TRL's DPOConfig) or cpo (TRL's CPOConfig)",
    "hinge": (
        "objective: hinge (SimPO's), dpo-hinge (TRL's DPOConfig) or cpo-hinge (TRL's CPOConfig)"
    ),
    "ipo": (
        "objective: ipo (gamma-PO, TRL's DPOConfig) or cpo-ipo (TRL's CPOConfig, no reference)"
    ),
    "kto": (
        "objective: kto for gamma-PO's, on pairs; TRL's KTOConfig takes its KL term from "
        "mismatched pairs"
    ),
}
"""What to write instead of a ``loss_type`` that means several losses."""

TRL_ONLY = ("cpo_alpha", "simpo_gamma", "rpo_alpha", "precompute_ref_log_probs")
"""Keys of TRL's files that say something of the loss, beside which a published script's
meaning of ``loss_type`` is doubtful too."""

MARGINS = ("gamma_beta_ratio", "gamma", "simpo_gamma")


def check_loss_type(settings: Settings, script: str | None) -> None:
    """Raise ``UserError`` where ``loss_type`` may mean another loss than it would train here.

    ``trainer_type`` or a published script's twin (``script``) settles it, and so does a list,
    which only TRL's DPOConfig has.
    """
    given = settings.get("loss_type")
    if not isinstance(given, str) or settings.get("objective") is not None:
        return
    of_trl = [name for name in TRL_ONLY if settings.get(name) not in (None, False)]
    if settings.get("trainer_type") is not None or (script is not None and not of_trl):
        return
    losses = [term.rpartition("*")[2].strip() for term in given.split("+")]
    for loss in (each for each in losses if each in MEANINGS):
        beside = f" ({of_trl[0]} is TRL's)" if of_trl else ""
        raise UserError(
            f"loss_type: {loss} means another loss in each library{beside}; instead of it write "
            f"{MEANINGS[loss]}"
        )
    if "simpo" in losses:
        _check_simpo(settings)


def _check_simpo(settings: Settings) -> None:
    """TRL's CPOConfig has its own margin, and an NLL term, where nothing is said of them."""
    if all(settings.get(name) is None for name in MARGINS):
        raise UserError(
            "loss_type: simpo has another margin in each library where none is given; add "
            "gamma_beta_ratio: (in gamma-PO 0.25 if left out) or simpo_gamma: (in TRL 0.5, which "
            "is 0.5 / beta as a gamma_beta_ratio)"
        )
    if settings.get("simpo_gamma") is not None and settings.get("cpo_alpha") is None:
        raise UserError(
            "loss_type: simpo beside simpo_gamma is TRL's CPOConfig, which adds an NLL term of "
            "weight 1.0 if cpo_alpha is left out; write cpo_alpha: 1.0, or 0.0 for SimPO alone"
        )
