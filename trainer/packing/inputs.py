"""Names of what a collated batch holds, for those who take it: models and objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .images import IMAGE_INPUTS
from .varlen import VARLEN_ARGUMENTS

MODEL_INPUTS = (
    *("input_ids", "attention_mask", "position_ids", "segment_ids", "branch_ids"),
    *VARLEN_ARGUMENTS,
    *("select", "targets", "own_targets"),
    *IMAGE_INPUTS,
)

PAIR_INPUTS = ("edges", "weights", "margins", "prompt_cu_seqlens", "prompts")
"""What an objective takes of a batch beside sequences, where the batch has it."""

MISMATCHED, FROZEN = "mismatched_", "frozen_"
"""Before the names of what a batch has of answers after other prompts than their own: of them
alone, which the policy scores, and of all answers, which a frozen model scores."""


NEEDED = ("input_ids", "select", "targets", "cu_seqlens", "pair_ids")
"""What the trainer reads of every batch."""


def check_collator(collate: Any, row: Mapping[str, Any]) -> None:
    """Raise ``UserError`` where a user's collator makes no batch of pairs, from one row."""
    batch = collate([row])
    missing = [name for name in NEEDED if not isinstance(batch, Mapping) or name not in batch]
    if missing:
        raise UserError(
            "data_collator: make the batch with PairCollator and add to it; it has no "
            f"{', '.join(missing)}"
        )


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a patched model's forward, out of a collated batch."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def inputs_after(prefix: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a batch has under names with the prefix, `MISMATCHED` or `FROZEN`; empty for nothing."""
    names = (name for name in batch if name.startswith(prefix))
    return {name.removeprefix(prefix): batch[name] for name in names}
