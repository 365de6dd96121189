"""The published scripts: what they did where a file says nothing, and how a run departs from them.

Their twins here take over the former; each value is one that a file or the command line may give,
and then that counts. A departure is on purpose, and names what undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Departure:
    """One deliberate difference. ``applies(config, hyperparameters)`` says whether a run has it."""

    text: str
    applies: Callable[[Any, Settings], bool]
    undo: str = "no switch"


def _objective(*names: str, beside: str = "") -> Callable[[Any, Settings], bool]:
    """Whether a run has one of these objectives, and the hyperparameter ``beside`` is not 0."""
    return lambda config, given: (
        any(part in names for part, _ in parts_of(config.objective))
        and bool(not beside or given.get(beside))
    )


def _always(config: Any, given: Settings) -> bool:
    return True


_MOVING = ("lmpo", "gamma-simpo", "gamma-dpo", "beta-simpo", "beta-dpo")

DEPARTURES = (
    Departure(
        "pairs share rows without padding where the model allows it; the sums are the same",
        lambda config, _: config.packing != "padded",
        "undone by packing: padded",
    ),
    Departure(
        "a row that cannot train (identical sides, an empty answer, nothing left of one) is left "
        "out and counted; there it trained, or gave NaN",
        lambda config, _: not config.strict_data,
        "strict_data: true stops at the first",
    ),
    Departure(
        "a step's loss is the mean over its pairs; there over its micro-batches' means, which is "
        "another number where the last micro-batch of an epoch is smaller",
        _always,
    ),
    Departure(
        "sides that merge with the prompt's last token differently share a prompt one token "
        "shorter; there each kept its own",
        lambda config, _: config.chat_rendering == "separate",
        "undone by chat_rendering: joint",
    ),
    Departure(
        "pairs that fill no step at the end of an epoch are a smaller step of their own, except in "
        "the last; there their gradient went into the next epoch's first step",
        lambda config, _: config.num_train_epochs > 1,
        "undone by num_train_epochs: 1",
    ),
    Departure(
        "running statistics and queues change in training only, are the same on all ranks, and "
        "are saved with checkpoints; there evaluation changed them, and none were saved",
        _objective(*_MOVING),
    ),
    Departure(
        "the queue of gaps starts empty and holds all ranks' pairs; there it started with eight "
        "random numbers, and each rank had its own",
        _objective("gamma-simpo", "gamma-dpo"),
    ),
    Departure(
        "z is divided by the deviation + 1e-6; there by the deviation, which gives NaN for margins "
        "that are all the same. At a deviation of 0.05 it is 2e-5 of z",
        _objective("lmpo"),
    ),
    Departure(
        "the KL terms are not differentiated, as in the paper; there they were, which turns the "
        "gradient: by 0.6 to 0.7 of its norm for eight random pairs",
        _objective("kto"),
    ),
    Departure(
        "alpha * (chosen - rejected tokens) is added to the gap, as in the paper; there it was "
        "subtracted, of batch sizes in place of lengths, so that nothing came of it. With alpha "
        "0.01, 100 tokens more are 1.0",
        _objective("r-dpo"),
        "undone by alpha: 0",
    ),
    Departure(
        "label smoothing keeps the margin's sign, as in the paper; gamma-PO's SimPO trainer turned "
        "it: -log sigmoid(-gap - gamma) in place of -log sigmoid(gamma - gap)",
        _objective("simpo", beside="label_smoothing"),
        "undone by label_smoothing: 0",
    ),
    Departure(
        "label smoothing counts for cpo, as in TRL; gamma-PO's trainer left it without effect",
        _objective("cpo", beside="label_smoothing"),
        "undone by label_smoothing: 0",
    ),
    Departure(
        "at least one pair is drawn; there 80% of one pair were none, and the loss NaN",
        _objective("beta-simpo", "beta-dpo"),
    ),
    Departure(
        "flip swaps each training pair by a seeded draw; there whole micro-batches, in evaluation "
        "too",
        lambda config, _: config.flip > 0,
        "undone by flip: 0",
    ),
    Departure(
        "sft_weight's term averages over each chosen answer's tokens, then over pairs; there over "
        "all chosen tokens of a micro-batch",
        lambda _, given: bool(given.get("sft_weight")) and given.get("nll") != "tokens",
        "undone by nll: tokens",
    ),
)


def departures(config: Any) -> list[str]:
    """A line for each departure of this run; ``config`` is its `PreferenceConfig`."""
    given = config.objective_args
    return [f"{each.text} [{each.undo}]" for each in DEPARTURES if each.applies(config, given)]


def kept_defaults(config: Any, given: Settings) -> list[str]:
    """A line for each setting that a file leaves out and a published script had otherwise.

    Args:
        config: the `PreferenceConfig` of the file.
        given: the file's keys and values.
    """
    theirs = defaults_of_scripts(given)
    pairs = [(name, getattr(config, name), value) for name, value in theirs.items()]
    objective = config.build_objective().hyperparameters
    of_class = left_out(config.objective, _script(config, given), config.hyperparameters())
    pairs += [(name, getattr(objective, name), value) for name, value in of_class.items()]
    lines = [
        f"{name}: {yaml_value(ours)}; there {yaml_value(value)}"
        for name, ours, value in pairs
        if ours != value
    ]
    return [*lines, "an epoch's last pairs that fill no step are a smaller step; there left out"]


def _script(config: Any, given: Settings) -> str:
    """The script whose file it is, as far as its keys tell."""
    if given.get("trainer_type") is not None:
        return "run_xpo"
    return "run_lmpo" if config.objective == "lmpo" else "run_simpo"


def is_published(settings: Settings) -> bool:
    """Whether a file is one of the published scripts', by keys that only they have together."""
    theirs = ("evaluation_strategy", "warmup_ratio", "torch_dtype", "trainer_type", "loss_type")
    return "dataset_mixer" in settings and any(name in settings for name in theirs)
