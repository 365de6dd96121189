"""Whether a run may go on from a checkpoint: what must be as it was, and what need not.

A resumed run sees the same pairs in the same steps as one that was never stopped. The planner
follows from seed, data, pairs per step and (where the objective couples pairs) micro-batches per
step; ranks and packing only deal the work out.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ..model.adapters import bare_model
from ..reference.cache import tokens_digest

if TYPE_CHECKING:
    from ..trainer import PreferenceTrainer

Facts = dict[str, Any]

_OPTIMIZER = ("optim", "learning_rate", "weight_decay", "lr_scheduler_type")


def run_facts(trainer: PreferenceTrainer) -> Facts:
    """What a checkpoint's manifest says of its run, of plain JSON types."""
    args, objective = trainer.args, trainer.objective
    settings: Any = args
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    config = bare_model(model).config.get_text_config()
    facts = {
        "objective": {
            "name": objective.name,
            **dataclasses.asdict(objective.hyperparameters),
        },
        "couples_pairs": objective.couples_pairs,
        "pairs_per_step": settings.pairs_per_step,
        "micro_batches": args.gradient_accumulation_steps,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "drop_last": args.dataloader_drop_last,
        "pairs": len(trainer.train_dataset),  # pyright: ignore[reportArgumentType]
        "tokens": tokens_digest(trainer.train_dataset),  # pyright: ignore[reportArgumentType]
        "model": {
            "type": config.model_type,
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
            "vocabulary": config.vocab_size,
            "adapter": sorted(getattr(model, "peft_config", {})),
        },
        **{name: getattr(args, name) for name in _OPTIMIZER},
        "ranks": args.world_size,
        "engine": _engine(trainer),
        "packing": getattr(trainer.data_collator, "layout", "padded"),
        "weights_only": args.save_only_model,
    }
    return json.loads(json.dumps(facts, default=lambda value: getattr(value, "value", str(value))))


def _engine(trainer: PreferenceTrainer) -> str:
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    return "FSDP" if trainer.is_fsdp_enabled else "none or DDP"


def compare(saved: Facts, now: Facts) -> tuple[list[str], list[str]]:
    """What forbids going on, and what is worth saying, one phrase each."""
    forbidden, notes = [], []

    def changed(name: str) -> bool:
        return saved.get(name) != now.get(name)

    def differs(name: str) -> str:
        return f"{name} was {saved.get(name)}, is {now.get(name)}"

    if saved.get("weights_only"):
        forbidden.append("it holds weights alone (save_only_model)")
    for name in ("objective", "model"):
        before, after = saved.get(name) or {}, now[name]
        keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        keys = ["name"] if "name" in keys else keys  # another objective has other settings
        forbidden += [f"{name} {key} was {before.get(key)}, is {after.get(key)}" for key in keys]
    if changed("pairs_per_step"):
        forbidden.append(differs("pairs_per_step") + _batch_advice(saved, now))
    elif changed("micro_batches"):
        phrase = f"gradient_accumulation_steps was {saved['micro_batches']}, is "
        phrase += str(now["micro_batches"])
        if now["couples_pairs"]:
            why = f" ({now['objective']['name']} couples the pairs of a global micro-batch)"
            forbidden.append(phrase + why + _batch_advice(saved, now))
        else:
            notes.append(f"{phrase}: steps keep their pairs")
    if changed("pairs"):
        forbidden.append(f"the training data had {saved.get('pairs')} pairs, has {now['pairs']}")
    elif changed("tokens"):
        forbidden.append("the training data has other tokens")
    forbidden += [differs(name) for name in ("seed", "drop_last", *_OPTIMIZER) if changed(name)]
    if changed("engine"):
        forbidden.append(differs("engine"))
    elif changed("ranks") and now["engine"] == "DeepSpeed":
        forbidden.append(f"{differs('ranks')}, and DeepSpeed's files are split by rank")
    elif changed("ranks"):
        notes.append(f"{differs('ranks')}: steps keep their pairs, results to rounding")
    if changed("packing"):
        notes.append(f"{differs('packing')}: the same results to rounding")
    return forbidden, notes


def _batch_advice(saved: Facts, now: Facts) -> str:
    """Settings that give these ranks the checkpoint's steps, where there are any."""
    steps, ranks = saved.get("micro_batches") or 1, now["ranks"]
    size, rest = divmod(saved.get("pairs_per_step") or 0, steps * ranks)
    if rest or not size:
        return f": {ranks} ranks cannot share {steps} micro-batches of its steps equally"
    return f": set per_device_train_batch_size: {size}, gradient_accumulation_steps: {steps}"
