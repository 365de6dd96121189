"""Published settings in ours: names by the table in `keys`, then the objective they mean.

What a key became is reported, once, in ``notes``.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from ...errors import UserError, expect_one_of
from ...objectives import OBJECTIVES, canonical_name, hyperparameters_of, parts_of, spec_of
from .keys import TABLE, Key, Settings, note, number, yaml_value
from .loss_type import IN_DPO, trl_mixture, without_effect

DATA = ("dataset", "dataset_name", "dataset_mixer")
"""What names the data, of which there is one."""


def translate(settings: Settings, notes: list[str]) -> Settings:
    """``settings`` under our names; a line for each that had another goes to ``notes``.

    Keys that are not in the table, and those it leaves to the objective, stay as they are.
    """
    result: Settings = {}
    for name, value in settings.items():
        key = TABLE.get(name)
        if key is None or key.translate is None:
            if name not in result:
                result[name] = value
            continue
        new = key.translate(value, settings)
        for ours, meant in new.items():
            # A warmup_steps of 0 and a null are no other opinion.
            if settings.get(ours) not in (None, 0) or result.get(ours) not in (None, 0, meant):
                raise UserError(f"{name} and {ours} are both given and mean the same; keep {ours}")
            result[ours] = meant
        notes.append(note(name, value, new, key.left_out if not new else _null(key, value)))
    return result


def _null(key: Key, value: Any) -> str:
    """A null that has become a value is explained."""
    return key.meaning if value is None else ""


def merge(file: Settings, overrides: Settings) -> Settings:
    """``file`` with ``overrides`` in place of what it says on the same matter, by any name."""
    objectives = _named_objectives(file | overrides)
    matters = {_matter(name, objectives) for name in overrides}

    def kept(settings: Settings) -> Settings:
        return {n: v for n, v in settings.items() if _matter(n, objectives) not in matters}

    result = kept(file)
    arguments = result.get("objective_args")
    if isinstance(arguments, dict):
        result["objective_args"] = kept(arguments)
    return result | overrides


def _named_objectives(settings: Settings) -> list[str]:
    """The objectives that ``settings`` name, by any form; unknown ones are refused later."""
    given = [settings.get(name) for name in ("objective", "loss_type")]
    names = []
    for value in (part for each in given for part in (each if isinstance(each, list) else [each])):
        with suppress(UserError):
            names += [name for name, _ in parts_of(value or "")]
    return names


def _matter(name: str, objectives: Iterable[str]) -> str:
    """What a key decides. trainer_type goes with either value of loss_type."""
    if name in DATA:
        return "dataset"
    key = TABLE.get(name)
    if name == "cpo_alpha" or not key or not key.becomes or name == "trainer_type":
        return name_here(name, objectives)
    return name_here(key.becomes, objectives)


WEIGHS_LIKELIHOOD = {"cpo", "cpo-hinge", "cpo-ipo"}
"""Objectives whose alpha is TRL's cpo_alpha; in others an alpha means something else."""


def name_here(name: str, objectives: Iterable[str]) -> str:
    """The hyperparameter of these objectives, parts of one mixture, that ``name`` stands for."""
    objectives = set(objectives)
    if name == "cpo_alpha":
        return "alpha" if objectives & WEIGHS_LIKELIHOOD else "sft_weight"
    known = {each for objective in objectives for each in hyperparameters_of(objective)}
    if name == "gamma_beta_ratio" and name not in known and "alpha" in known:
        return "alpha"
    return name


SCRIPTS = {"run_lmpo": "lmpo", "run_simpo": "simpo", "run_xpo": None}
"""Published scripts and the objective each trains where its file names none."""

TRAINER_TYPES = ("simpo", "dpo")
ALWAYS_MEANS = ("simpo", "hinge", "lmpo", "gamma-simpo", "beta-simpo", "orpo")
ALWAYS_MEANS += ("alphapo", "repo", "simper", "sft")
"""Objectives that know no sums, whatever ``length_norm`` says."""


def name_objective(settings: Settings, sigmoid: str | None, notes: list[str]) -> Settings:
    """``settings`` with ``objective`` instead of ``loss_type`` and ``trainer_type``.

    Args:
        sigmoid: the objective of the launched script: what ``loss_type: sigmoid`` means, and what
            is trained where nothing is named.
    """
    settings = dict(settings)
    if isinstance(settings.get("objective"), dict):
        settings["objective"] = canonical_name(settings["objective"])
    if settings.get("objective") is not None and settings.get("loss_type") is not None:
        raise UserError("loss_type and objective are both given and mean the same; keep objective")
    settings = trl_mixture(settings, notes)
    loss_type, trainer_type = settings.pop("loss_type", None), settings.pop("trainer_type", None)
    if trainer_type is not None:
        expect_one_of("trainer_type", trainer_type, TRAINER_TYPES)
    if settings.get("objective") is not None:
        if trainer_type is not None:
            notes.append(note("trainer_type", trainer_type, {}, "the objective is named"))
        return settings
    objective = _objective(loss_type, trainer_type, sigmoid)
    if objective is None:
        raise UserError(
            "objective: none is named; for a published file of SimPO, LMPO or gamma-PO start -m "
            "widemargin.trainer.run_simpo, run_lmpo or run_xpo in place of widemargin train; "
            f"otherwise add objective: with one of {', '.join(OBJECTIVES)}"
        )
    settings["objective"] = objective
    if loss_type == "alphapo" and settings.get("cpo_alpha") is not None:
        _drop(settings, "cpo_alpha", "TRL's alphapo sets it to 0", notes)
    published = loss_type is not None or trainer_type is not None
    given = {"loss_type": loss_type, "trainer_type": trainer_type}
    said = ", ".join(f"{n}: {yaml_value(v)}" for n, v in given.items() if v is not None)
    notes.append(f"{said or 'no objective named'} -> objective: {objective}")
    return _hyperparameters(settings, objective, trainer_type, notes) if published else settings


def _objective(loss_type: Any, trainer_type: str | None, sigmoid: str | None) -> str | None:
    if isinstance(loss_type, list):
        (loss_type,) = loss_type
        if trainer_type != "simpo":  # only TRL's DPOConfig has lists
            loss_type = IN_DPO.get(str(loss_type), loss_type)
    if loss_type is None:
        return "dpo" if trainer_type == "dpo" else sigmoid
    if loss_type == "sigmoid":
        return "dpo" if trainer_type == "dpo" else sigmoid or "simpo"
    objective = canonical_name(str(loss_type))
    if sigmoid == "lmpo" and objective == "hinge":
        raise UserError("loss_type: hinge has no form with LMPO's margin; use run_simpo")
    if objective == "hinge" and trainer_type == "dpo":
        raise UserError(
            "loss_type: hinge is SimPO's, over means without a reference; write objective: hinge "
            "for it, or dpo-hinge for the one with a reference model"
        )
    if trainer_type and spec_of(objective).needs_reference != (trainer_type == "dpo"):
        other = "dpo" if trainer_type == "simpo" else "simpo"
        raise UserError(
            f"loss_type: {loss_type} does not go with trainer_type: {trainer_type}; set "
            f"trainer_type: {other}"
        )
    return objective


def _hyperparameters(
    settings: Settings, objective: str, trainer_type: str | None, notes: list[str]
) -> Settings:
    """What one published name means for this objective in particular."""
    known = hyperparameters_of(objective)
    if objective == "cpo" and "length_norm" in known and settings.get("length_norm") is None:
        settings["length_norm"] = True
        notes.append("length_norm: true, as the published trainer has cpo")
    if objective == "ipo" and trainer_type and settings.get("gamma_beta_ratio") is not None:
        ratio, beta = settings.pop("gamma_beta_ratio"), settings.pop("beta", None)
        settings["beta"] = ratio
        why = f"which had ipo's strength there; beta: {yaml_value(beta)} scaled logged rewards only"
        notes.append(note("gamma_beta_ratio", ratio, {"beta": ratio}, why))
    for name in ("beta", "tau", "gamma_beta_ratio"):
        if settings.get(name) is not None and name_here(name, _parts(objective)) not in known:
            _drop(settings, name, f"{objective} does not use it", notes)
    return settings


def fit_objective(settings: Settings, notes: list[str]) -> Settings:
    """Shared keys under the name, or with the only value, that the objective has for them."""
    settings = dict(settings)
    objective = canonical_name(str(settings["objective"]))
    known = hyperparameters_of(objective)
    settings = without_effect(settings, known, objective, notes)
    if settings.get("cpo_alpha") is not None:
        new = name_here("cpo_alpha", _parts(objective))
        if new == "alpha" and settings.get("alpha") == 0:
            _drop(settings, "alpha", "at 0 TRL's is without effect", notes)
        if new == "alpha" and settings.get("alpha") is not None:
            raise UserError(
                "alpha: in TRL's CPOConfig it is AlphaPO's; leave it out where it is 0, or write "
                "objective: alphapo and sft_weight in place of cpo_alpha"
            )
        if _rename(settings, "cpo_alpha", new, notes) and settings.get("nll") is None:
            settings["nll"] = "tokens"
            notes.append("nll: tokens, as TRL averages the likelihood of cpo_alpha")
    ratio_here = name_here("gamma_beta_ratio", _parts(objective))
    if settings.get("gamma_beta_ratio") is not None and ratio_here != "gamma_beta_ratio":
        _rename(settings, "gamma_beta_ratio", ratio_here, notes)
    if "length_norm" in settings and "length_norm" not in known:
        means, value = objective in ALWAYS_MEANS, settings["length_norm"]
        why = f"{objective} {'always uses means' if means else 'uses sums only'}"
        if value not in (None, means):
            raise UserError(f"length_norm: {why}, got {value!r}; leave it out")
        _drop(settings, "length_norm", why, notes)
    if "label_smoothing" in settings and "label_smoothing" not in known:
        value = settings["label_smoothing"]
        if number("label_smoothing", value):
            raise UserError(
                f"label_smoothing: {objective} has none, here as in the published trainers, which "
                f"left {value!r} without effect; leave it out"
            )
        _drop(settings, "label_smoothing", f"{objective} has none", notes)
    return settings


def _parts(objective: str) -> list[str]:
    return [name for name, _ in parts_of(objective)]


def _drop(settings: Settings, name: str, why: str, notes: list[str]) -> None:
    notes.append(note(name, settings.pop(name), {}, why))


def _rename(settings: Settings, old: str, new: str, notes: list[str]) -> Any:
    """Give ``new`` the value of ``old``; returns it."""
    if settings.get(new) is not None:
        raise UserError(f"{old} and {new} are both given and mean the same; keep {new}")
    value = settings[new] = settings.pop(old)
    notes.append(note(old, value, {new: value}))
    return value
