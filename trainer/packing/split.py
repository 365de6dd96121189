"""Which rows cannot be split over ranks (``sequence_parallel_size``), and what to do instead."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..parallel.groups import Place
from ..settings.checks import is_split
from .choose import Packing
from .recurrent import is_recurrent
from .verify import compare_with_alone

if TYPE_CHECKING:
    from ..settings.config import PreferenceConfig


def check_split(args: PreferenceConfig, config: Any, ranks: int | None) -> None:
    """Raise ``UserError`` for settings or a model whose rows cannot be split.

    Args:
        config: the model's.
        ranks: of the launch; None where it is not known yet.
    """
    size, text = args.sequence_parallel_size, config.get_text_config()
    if size == 1:
        return
    heads = getattr(text, "num_attention_heads", None)
    attention = str(args.attn_implementation or "sdpa")
    obstacles = {
        f"sequence_parallel_size: start a multiple of {size} processes (accelerate launch, "
        "torchrun, --gpus of a plan), or set it to 1": ranks is not None and ranks % size,
        "packing: set auto; sequence_parallel_size splits no padded rows": (
            args.packing == "padded"
        ),
        "attn_implementation: set sdpa or flash_attention_2; other attention takes no rows that "
        "sequence_parallel_size splits": attention != "sdpa" and "flash" not in attention,
        "torch_compile: set it to false; it was not tried with sequence_parallel_size": (
            args.torch_compile
        ),
        "include_num_input_tokens_seen: set no; it counts a row once on each of the ranks that "
        "share it (sequence_parallel_size), and num_tokens counts rightly": (
            args.include_num_input_tokens_seen not in ("no", False)
        ),
        f"sequence_parallel_size: set it to 1; {text.model_type} has recurrent layers, which read "
        "a row from left to right": is_recurrent(text),
        f"sequence_parallel_size: set it to a divisor of the model's {heads} attention heads": (
            isinstance(heads, int) and heads % size
        ),
    }
    for message, applies in obstacles.items():
        if applies:
            raise UserError(message)


def refuse_split(args: PreferenceConfig, what: str) -> None:
    """Raise ``UserError`` for a part of a run that no split row can have."""
    if args.sequence_parallel_size > 1:
        raise UserError(
            f"sequence_parallel_size: set it to 1, or leave out {what}; their rows are not split"
        )


def over_ranks(packing: Packing, place: Place | None) -> Packing:
    """The packing with each row over the ranks of ``place``; itself for None.

    Raises:
        UserError: its rows are not of those without padding.
    """
    if place is None:
        return packing
    if packing.layout == "padded" or packing.rows != "varlen":
        raise UserError(
            "sequence_parallel_size: set it to 1, or have rows without padding (packing: auto; "
            "attn_implementation: sdpa, and bf16: true on a GPU); here they are "
            f"{packing.layout} ({packing.reason})"
        )
    return replace(packing, place=place)


def split_packing(packing: Packing, model: Any, args: PreferenceConfig, stand_in: Any) -> Packing:
    """The packing with each row over ``sequence_parallel_size`` ranks; a collective of all.

    The model is tried on such rows, or its ``stand_in`` where DeepSpeed or FSDP splits its weights.

    Raises:
        UserError: rows of another kind, or a model that gives other numbers on split ones.
    """
    place = Place.of(args)
    packing = over_ranks(packing, place)
    tried = stand_in if is_split(args) else model
    if place is None or tried is None:
        return packing
    if tried.config.get_text_config().num_attention_heads % place.size:  # a stand-in has few
        return packing
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    with nullcontext() if half is None else torch.autocast(args.device.type, half):
        failure = compare_with_alone(tried, packing)
    if failure is not None:
        raise UserError(
            f"sequence_parallel_size: set it to 1; this model takes no split rows: {failure}"
        )
    return packing
