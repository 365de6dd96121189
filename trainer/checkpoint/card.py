"""The model card: README.md of a trained model, written from what the run knows of itself."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model.adapters import bare_model
from ..monitor.history import Run, flatten
from ..objectives import parts_of
from ..text import duration, figure, is_place, unplaced

if TYPE_CHECKING:
    from transformers import Trainer

    from ..objectives import Objective

PAPERS = {
    "simpo": ("SimPO: Simple Preference Optimization with a Reference-Free Reward", "2405.14734"),
    "hinge": ("SLiC-HF: Sequence Likelihood Calibration with Human Feedback", "2305.10425"),
    "lmpo": (
        "Length-Controlled Margin-Based Preference Optimization without Reference Model",
        "2502.14643",
    ),
    "gamma-simpo": ("Robust Preference Optimization via Dynamic Target Margins", "2506.03690"),
    "gamma-dpo": ("Robust Preference Optimization via Dynamic Target Margins", "2506.03690"),
    "beta-simpo": ("β-DPO: Direct Preference Optimization with Dynamic β", "2407.08639"),
    "beta-dpo": ("β-DPO: Direct Preference Optimization with Dynamic β", "2407.08639"),
    "dpo": (
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "2305.18290",
    ),
    "r-dpo": ("Disentangling Length from Quality in Direct Preference Optimization", "2403.19159"),
    "ipo": (
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "2310.12036",
    ),
    "alphapo": ("AlphaPO: Reward Shape Matters for LLM Alignment", "2501.03884"),
    "repo": ("RePO: ReLU-based Preference Optimization", "2503.07426"),
    "simper": (
        "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters",
        "2502.00883",
    ),
    "kto": ("KTO: Model Alignment as Prospect Theoretic Optimization", "2402.01306"),
    "cpo": ("Contrastive Preference Optimization", "2401.08417"),
    "robust": (
        "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        "2403.00409",
    ),
    "exo": ("Towards Efficient Exact Optimization of Language Model Alignment", "2402.00856"),
    "nca": ("Noise Contrastive Alignment of Language Models with Explicit Rewards", "2402.05369"),
    "bco": (
        "Binary Classifier Optimization for Large Language Model Alignment",
        "2404.04656",
    ),
    "sppo": ("Self-Play Preference Optimization for Language Model Alignment", "2405.00675"),
    "aot": ("Distributional Preference Alignment of LLMs via Optimal Transport", "2406.05882"),
    "apo-zero": (
        "Anchored Preference Optimization and Contrastive Revisions: Addressing "
        "Underspecification in Alignment",
        "2408.06266",
    ),
    "discopop": (
        "Discovering Preference Optimization Algorithms with and for Large Language Models",
        "2406.08414",
    ),
    "orpo": ("ORPO: Monolithic Preference Optimization without Reference Model", "2403.07691"),
    "lipo": ("LiPO: Listwise Preference Optimization through Learning-to-Rank", "2402.01878"),
    "rrhf": (
        "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
        "2304.05302",
    ),
    "pro": ("Preference Ranking Optimization for Human Alignment", "2306.17492"),
}
"""Title and arXiv number of what each objective is from; sft is from no paper."""

PAPERS |= {
    "dpo-hinge": PAPERS["hinge"],
    "dpo-norm": PAPERS["dpo"],
    "cpo-hinge": PAPERS["cpo"],
    "cpo-ipo": PAPERS["cpo"],
    "bco-pair": PAPERS["bco"],
    "nca-pair": PAPERS["nca"],
    "infonca": PAPERS["nca"],
    "plackett-luce": PAPERS["dpo"],
    "aot-unpaired": PAPERS["aot"],
    "apo-down": PAPERS["apo-zero"],
    "apo-zero-unpaired": PAPERS["apo-zero"],
}

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ASIDE = {
    "accelerator_config",
    "dataloader_pin_memory",
    "disable_tqdm",
    "do_eval",
    "report_to",
    "run_name",
    "use_cpu",
}
"""Settings of where a run was and what it said there, which make no other model."""


def write_model_card(
    trainer: Trainer, objective: Objective, record: dict[str, Any], **given: Any
) -> Path:
    """Write README.md to the trainer's ``output_dir``.

    Args:
        record: as in ``run.json``: settings, objective, data, versions and device.
        given: what `transformers.Trainer.create_model_card` takes, such as ``license``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    settings = record["settings"]
    base = given.get("finetuned_from") or settings.get("model_name_or_path")
    data_sets = given.get("dataset") or settings.get("dataset") or settings.get("dataset_mixer")
    tags = given.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    standard = ["widemargin", "generated_from_trainer", "preference-optimization"]
    parts = [part for part, _ in parts_of(objective.name)]
    model: Any = trainer.model
    model = trainer.accelerator.unwrap_model(model)
    adapter = hasattr(model, "peft_config")
    of_adapter = bare_model(model).name_or_path if adapter else None
    front = ModelCardData(
        language=given.get("language"),
        license=given.get("license"),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*dict.fromkeys([*tags, *standard, *parts])],
        base_model=_on_hub(base) or _on_hub(of_adapter),  # the latter of an adapter that went on
        datasets=[name for name in map(_on_hub, _listed(data_sets)) if name] or None,
    )
    name = given.get("model_name") or Path(str(trainer.args.output_dir)).absolute().name
    body = card_body(trainer, objective, name, base, record)
    path = Path(str(trainer.args.output_dir)) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{front.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=True).save(path)
    return path


def card_body(
    trainer: Trainer, objective: Objective, name: str, base: str | None, record: dict[str, Any]
) -> str:
    """The card below its front matter, in Markdown."""
    folder, history = Path(str(trainer.args.output_dir)), trainer.state.log_history
    run, best = Run(folder, history), _kept_step(trainer)
    kept = [entry for entry in history if best is None or entry.get("step", 0) <= best]
    start = f" from {_code(unplaced(base))}" if base else ""
    if base and unplaced(base) != base:
        start += " (a local folder)"
    settings = {k: v for k, v in record["settings"].items() if k not in ASIDE and v not in ([], {})}
    parts = [
        f"# {_plain(name)}",
        f"Trained{start} on preference pairs with {objective.name}, by widemargin.",
        "## Objective",
        f"```\n{objective.name}: {objective.spec.formula}\n```",
        _hyperparameters_table(record.get("objective") or {}),
        _citation(objective.name),
        "## Results",
        _results_table(Run(folder, kept), best),
        _effort(run, record.get("device")),
        "## Data",
        _data_table(record.get("data") or {}),
        "## Settings",
        "All that differ from their defaults. With these lines as `config.yaml`, `widemargin train "
        "config.yaml` does it again.",
        _local_places(settings),
        f"```yaml\n{_yaml(unplaced(settings))}```",
        "## Versions",
        ", ".join(f"{key} {value}" for key, value in record.get("versions", {}).items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _local_places(settings: dict[str, Any]) -> str:
    """Which of the names in the settings the reader has to find a folder for."""
    given = [settings.get("model_name_or_path"), *_listed(settings.get("dataset"))]
    given += [settings.get("ref_model_name_or_path"), *_listed(settings.get("dataset_mixer"))]
    names = [name for name in given if isinstance(name, str) and is_place(name)]
    listed = ", ".join(dict.fromkeys(_code(unplaced(name)) for name in names))
    return (
        f"Local where it was trained, to be replaced by paths of yours: {listed}" if names else ""
    )


def _citation(name: str) -> str:
    papers = dict.fromkeys(PAPERS[part] for part, _ in parts_of(name) if part in PAPERS)
    return "\n\n".join(
        f"[{title}](https://arxiv.org/abs/{number}), arXiv:{number}" for title, number in papers
    )


def _kept_step(trainer: Trainer) -> int | None:
    """The step of the model that was kept, where that is not the last one's."""
    state = trainer.state
    loaded = trainer.args.load_best_model_at_end and state.best_model_checkpoint
    return state.best_global_step if loaded else None


def _results_table(run: Run, best: int | None) -> str:
    changes = run.changes()
    if not changes:
        return "Nothing was measured."
    where = "held-out pairs" if run.prefix() else "training pairs"
    last = "last" if best is None else f"step {best}, the best, kept here"
    rows = [f"| {where} | first | {last} |", "| --- | ---: | ---: |"]
    for change in changes:
        before = "" if change.before is None else figure(change.before)
        rows.append(f"| {change.label} | {before} | {figure(change.after)} |")
    return "\n".join(rows)


def _effort(run: Run, device: str | None) -> str:
    """How long it took, and on what."""
    seconds, rate = run.seconds(), run.pairs_per_s()
    said = [f"{run.last_step():g} steps"]
    said += [f"in {duration(seconds)}"] if seconds is not None else []
    said += [f"on {_plain(device)}"] if device else []
    said += [f"at {figure(rate)} pairs per second"] if rate is not None else []
    return " ".join(said)


def _hyperparameters_table(values: dict[str, Any]) -> str:
    rows = [
        f"| {_code(name)} | {_code(value)} |"
        for name, value in flatten(values)
        if name != "name" and not (isinstance(value, float) and math.isnan(value))
    ]
    return "\n".join(["| | |", "| --- | --- |", *rows]) if rows else ""


def _data_table(data: dict[str, Any]) -> str:
    """What was trained and evaluated on: a column a split."""
    splits = {name: part for name, part in data.items() if isinstance(part, dict)}
    if not splits:
        return ""
    rows = {"from": [", ".join(map(_source, part["sources"])) for part in splits.values()]}
    rows["pairs"] = [f"{part['pairs']:,}" for part in splits.values()]
    for side in ("prompt", "chosen", "rejected"):
        stats = [part["lengths"].get(side) for part in splits.values()]
        rows[f"tokens, {side}"] = [
            f"mean {each['mean']:,.0f}, at most {each['max']:,}" if each else "" for each in stats
        ]
    for kind, said in (("flags", "{}"), ("skipped", "skipped: {}")):
        for name in dict.fromkeys(name for part in splits.values() for name in part[kind]):
            counts = [part[kind].get(name, 0) for part in splits.values()]
            rows[said.format(name)] = [f"{count:,}" for count in counts]
    if any(part["flipped"] for part in splits.values()):
        rows["sides swapped"] = [f"{part['flipped']:,}" for part in splits.values()]
    head = f"| | {' | '.join(map(_plain, splits))} |\n|{' --- |' * (len(splits) + 1)}"
    lines = [f"| {_plain(name)} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join([head, *lines])


def _source(source: dict[str, Any]) -> str:
    split = f" {_plain(source['split'])}" if source["split"] else ""
    return f"{_code(unplaced(source['name']))}{split}"


def _code(value: object) -> str:
    """A value as Markdown code that stays in its cell, whatever it holds."""
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    plain = " ".join(plain.split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain else ""


def _plain(name: str) -> str:
    return re.sub(r"([<>\[\]`*_|\\])", r"\\\1", " ".join(name.split()))


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(settings, allow_unicode=True, sort_keys=False).replace("```", "'''")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _on_hub(name: str | None) -> str | None:
    """The name if it can be one of the hub's; a folder of this machine says nothing there."""
    if not name or not HUB_NAME.fullmatch(name) or is_place(name):
        return None
    return name
