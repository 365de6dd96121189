"""TRL's lists of losses, ``loss_type: [sigmoid, sft]``, and its arguments for some losses alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...errors import UserError
from ...objectives import canonical_name
from .keys import Settings, note

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
    if settings.get("objective") is not None:
        raise UserError("loss_type and objective are both given and mean the same; keep objective")
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
