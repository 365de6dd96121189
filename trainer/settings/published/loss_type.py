"""``loss_type``: names that libraries share and mean differently, and TRL's lists of losses.

The former are asked about, never guessed: on the settings as they were given, before `translation`
renames their keys.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...errors import UserError
from ...objectives import canonical_name
from .keys import Settings, note

MEANINGS = {
    "sigmoid": "objective: simpo (SimPO's), dpo (TRL's DPOConfig) or cpo (TRL's CPOConfig)",
    "hinge": (
        "objective: hinge (SimPO's), dpo-hinge (TRL's DPOConfig) or cpo-hinge (TRL's CPOConfig)"
    ),
    "ipo": (
        "objective: ipo (gamma-PO, TRL's DPOConfig) or cpo-ipo (TRL's CPOConfig, no reference)"
    ),
    "kto": (
        "objective: kto (gamma-PO's, on pairs), or that with kl_estimate: mismatched (TRL's "
        "KTOConfig, on single answers with labels)"
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
    weights = [name for name in ("gamma_beta_ratio", "alpha") if settings.get(name) is not None]
    if "orpo" in losses and settings.get("beta") is not None and not weights:
        raise UserError(
            "loss_type: orpo beside beta is TRL's ORPOConfig; write alpha in place of beta (in "
            "gamma-PO beta is without effect, and gamma_beta_ratio the weight)"
        )


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


IN_DPO = {"sigmoid": "dpo", "hinge": "dpo-hinge"}
"""What TRL's DPOTrainer, which alone has lists, means by names that stand for others here."""


def trl_mixture(settings: Settings, notes: list[str]) -> Settings:
    """``settings`` with ``objective`` in place of several losses, or of weighted ones."""
    losses, weights = settings.get("loss_type"), settings.get("loss_weights")
    settings = {name: value for name, value in settings.items() if name != "loss_weights"}
    if not isinstance(losses, list) or (len(losses) == 1 and weights is None):
        if weights is not None:
            raise UserError("loss_weights: give loss_type a list of as many losses beside it")
        return settings
    del settings["loss_type"]
    settings["objective"] = _named(losses, [1.0] * len(losses) if weights is None else weights)
    new: dict[str, Any] = {"objective": settings["objective"]}
    if "sft" in losses and settings.get("nll") is None:
        new["nll"] = settings["nll"] = "tokens"  # as TRL averages its likelihood
    notes.append(note("loss_type", losses, new))
    return settings


def _named(losses: list[Any], weights: Any) -> str:
    if not isinstance(weights, list) or len(weights) != len(losses):
        raise UserError(f"loss_weights: expected {len(losses)} numbers, got {weights!r}")
    names = [IN_DPO.get(str(loss), str(loss)) for loss in losses]
    if len(set(names)) < len(names):
        raise UserError(f"loss_type: name each loss once, got {losses}")
    return canonical_name(dict(zip(names, weights, strict=True)))


OF_SOME = {
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": None,
    "discopop_tau": None,
    "ld_alpha": 1,
    "alpha": 0,
}
"""Arguments of some losses, and the value that leaves the others as they are; None: any does."""


def without_effect(
    settings: Settings, known: Collection[str], objective: str, notes: list[str]
) -> Settings:
    """``settings`` without what the objective does not have, where TRL's would not change either.

    Raises:
        UserError: a divergence that the objective has no form for.
    """
    settings = dict(settings)
    for name in sorted(OF_SOME.keys() & settings.keys() - set(known)):
        value, harmless = settings.pop(name), OF_SOME[name]
        if name == "alpha" and value not in (None, harmless):
            raise UserError(
                f"alpha: {objective} has none; TRL's, of CPOConfig, is objective: alphapo"
            )
        if harmless is not None and value not in (None, harmless):
            raise UserError(
                f"{name}: {objective} knows {harmless} alone, got {value!r}; leave it out"
            )
        notes.append(note(name, value, {}, f"{objective} has none"))
    return settings
