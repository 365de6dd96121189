"""Published setting names -> ours, by the table in `keys`.

What a key became is reported, once, in ``notes``. `objective` decides which objective the settings
name, and what follows from it.
"""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from ...objectives import ALIASES, OBJECTIVES, hyperparameters_of
from .keys import TABLE, Key, Settings, note

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
    has_alpha = _has_alpha(file | overrides)
    matters = {_matter(name, has_alpha) for name in overrides}

    def kept(settings: Settings) -> Settings:
        return {n: v for n, v in settings.items() if _matter(n, has_alpha) not in matters}

    result = kept(file)
    arguments = result.get("objective_args")
    if isinstance(arguments, dict):
        result["objective_args"] = kept(arguments)
    return result | overrides


def _has_alpha(settings: Settings) -> bool:
    """Whether the objective has an alpha, which is its gamma_beta_ratio and cpo_alpha."""
    given = [settings.get(name) for name in ("objective", "loss_type")]
    parts = [part for value in given for part in (value if isinstance(value, list) else [value])]
    names = [ALIASES.get(str(part), str(part)) for part in parts]
    return any(name in OBJECTIVES and "alpha" in hyperparameters_of(name) for name in names)


def _matter(name: str, has_alpha: bool) -> str:
    """What a key decides. trainer_type goes with either value of loss_type."""
    if name in DATA:
        return "dataset"
    key = TABLE.get(name)
    matter = key.becomes if key and key.becomes and name != "trainer_type" else name
    if matter == "gamma_beta_ratio" and has_alpha:
        return "alpha"
    return "sft_weight" if name == "cpo_alpha" and not has_alpha else matter
