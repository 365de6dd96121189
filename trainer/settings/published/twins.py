"""What the published scripts did where their files say nothing, for their twins here.

Each value is one that a file or the command line may give, and then that counts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...objectives import canonical_name, hyperparameters_of, parts_of
from .keys import Settings, note, number, yaml_value
from .translation import name_here

TWINS: Settings = {
    "chat_rendering": "separate",
    "tokenizer_as_saved": True,
    "auto_insert_empty_system_msg": True,
    "max_length": 512,
    "max_prompt_length": 128,
    "head_tail": "exact",
    "resume_from_checkpoint": "auto",
}
"""Settings of a run; null counts as left out, as it did there."""

_LORA_TARGETS = ["q_proj", "v_proj"]  # peft's choice for the published models


def as_published_script(settings: Settings, notes: list[str]) -> Settings:
    """``settings`` with what the published scripts added to the files they read."""
    added = defaults_of_scripts(settings)
    settings = settings | added
    notes += [f"{n}: {yaml_value(v)}, as the published script had it" for n, v in added.items()]
    name = "max_completion_length"
    if settings.get(name) is not None:
        why = "the published trainers ignored it; widemargin train keeps to it"
        notes.append(note(name, settings.pop(name), {}, why))
    return settings


def defaults_of_scripts(given: Settings) -> Settings:
    """What the published scripts had for settings of a run that are not ``given``."""
    theirs = dict(TWINS)
    if is_mistral(given.get("model_name_or_path")):
        theirs["chat_template"] = "mistral"
    if given.get("use_peft"):
        theirs["lora_target_modules"] = _LORA_TARGETS
    return {name: value for name, value in theirs.items() if given.get(name) is None}


def is_mistral(name: Any) -> bool:
    """Whether the scripts took their Mistral template for this model, by its name.

    They looked for mistral in the hub name or path. Of a local folder only the last part counts
    here: /data/mistral-runs/llama is none.
    """
    name = str(name or "")
    local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    return "mistral" in (Path(name).name if local else name).lower()


def as_published_class(settings: Settings, script: str, notes: list[str]) -> Settings:
    """``settings`` with the hyperparameters that the scripts' settings classes start from.

    Only those that the objective has; ``settings`` names it, under our names by now.
    """
    given = (settings.get("objective_args") or {}) | settings
    added = left_out(str(settings["objective"]), script, given)
    notes += [f"{n}: {yaml_value(v)}, as the published script had it" for n, v in added.items()]
    return settings | added


def left_out(name: str, script: str, given: Settings) -> Settings:
    """What the settings class of ``script`` had for hyperparameters that are not ``given``."""
    objective = canonical_name(name)
    parts = [part for part, _ in parts_of(objective)]
    start: Settings = {"beta": 2.0, name_here("gamma_beta_ratio", parts): 0.25}
    if objective == "ipo":
        start = {"beta": 0.25}  # which is their gamma_beta_ratio
    if script == "run_lmpo":
        start["zscore_bias_correction"] = False
    if script == "run_xpo":
        start |= {"tau": 1.0, "length_norm": True}
    if number("sft_weight", given.get("sft_weight")):
        start["nll"] = "tokens"
    known = hyperparameters_of(objective)
    return {n: v for n, v in start.items() if n in known and given.get(n) is None}


def published_steps(pairs: int, pairs_per_step: int, accumulation: int, epochs: float) -> int:
    """Steps of a run as the scripts counted them: what does not fill one is left out.

    Of an epoch's micro-batches, transformers 4 made as many steps as they filled, and at least one.
    """
    micro_batches = math.ceil(pairs * accumulation / pairs_per_step)
    return math.ceil(epochs * max(1, micro_batches // accumulation))
