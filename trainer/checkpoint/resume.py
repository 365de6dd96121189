"""The checkpoint that a run goes on from, and whether it may: what must be as it was.

A resumed run sees the same pairs in the same steps as one that was never stopped. The planner
follows from seed, data, pairs per step and (where the objective couples pairs) micro-batches per
step; ranks and packing only deal the work out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from ..errors import UserError
from ..model.adapters import bare_model
from ..monitor.run_record import objective_facts
from ..reference.cache import tokens_digest
from .files import MANIFEST, check_files, choose_checkpoint, settle_leftovers

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from ..data.table import PairRows
    from ..objectives import Objective
    from ..settings.config import PreferenceConfig

Facts = dict[str, Any]

_OPTIMIZER = ("optim", "learning_rate", "weight_decay", "lr_scheduler_type")

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenCheckpoint:
    """A checkpoint whose files have been checked against its manifest, if it has one."""

    folder: Path


def checkpoint_to_resume(
    args: TrainingArguments, setting: str | bool | None
) -> ChosenCheckpoint | None:
    """The checkpoint that ``resume_from_checkpoint`` means, read and hashed by the first rank.

    What a process that died left in ``output_dir`` is settled first. A collective with several
    ranks; see `choose_checkpoint`.
    """
    folder = str(args.output_dir)

    def choose() -> ChosenCheckpoint | None:
        settle_leftovers(Path(folder))
        checkpoint = choose_checkpoint(setting, folder)
        return None if checkpoint is None else ChosenCheckpoint(checkpoint)

    return on_first_rank(args, choose)


def on_first_rank(args: TrainingArguments, work: Callable[[], T]) -> T:
    """What ``work`` returns on the first rank, or its ``UserError``, on every rank."""
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    if args.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def check_same_run(checkpoint: Path, now: Facts) -> None:
    """Raise ``UserError`` for a checkpoint of another run; warn of what differs and may."""
    if not (checkpoint / MANIFEST).is_file():
        return
    forbidden, notes = compare(check_files(checkpoint, hashes=False)["run"], now)
    if forbidden:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} is of another run: {'; '.join(forbidden)}. "
            "Set what it was, or start a new run from its weights: model_name_or_path: "
            f"{checkpoint}, without resume_from_checkpoint"
        )
    for note in notes:
        logger.warning("Going on from %s: %s", checkpoint, note)


def run_facts(trainer: Trainer, objective: Objective, rows: PairRows, layout: str) -> Facts:
    """What a checkpoint's manifest says of its run, of plain JSON types.

    Args:
        rows: of training.
        layout: of their batches.
    """
    args: PreferenceConfig = trainer.args  # pyright: ignore[reportAssignmentType]
    model: Any = trainer.accelerator.unwrap_model(trainer.model)  # pyright: ignore[reportArgumentType]
    config = bare_model(model).config.get_text_config()
    facts = {
        "objective": objective_facts(objective),
        "couples_pairs": objective.couples_pairs,
        "pairs_per_step": args.pairs_per_step,
        "micro_batches": args.gradient_accumulation_steps,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "drop_last": args.dataloader_drop_last,
        "pairs": len(rows),
        "tokens": tokens_digest(rows),
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
        "packing": layout,
        "weights_only": args.save_only_model,
        "chat_date": args.chat_date,
    }
    return json.loads(json.dumps(facts, default=lambda value: getattr(value, "value", str(value))))


def _engine(trainer: Trainer) -> str:
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
        if changed("chat_date"):
            forbidden.append(differs("chat_date") + ", the date that the chat template writes")
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
