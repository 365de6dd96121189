"""What is tried on a model before it trains: head, causality, dropout, positions, what learns."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..packing.choose import longest_row
from ..packing.rope import fix_rope
from ..settings.checks import is_split
from ..settings.config import PreferenceConfig
from .adapters import bare_model
from .dropout import check_no_dropout, disable_dropout
from .generation import context_of
from .head import check_head, patch_head
from .stand_in import stand_in

if TYPE_CHECKING:
    from ..data.table import PairRows

logger = logging.getLogger(__name__)


def trial_model(model: Any, args: PreferenceConfig) -> Any:
    """A model to try in place of one that DeepSpeed or FSDP will split; None for one they do not.

    None too, with a warning, where no small model can be made of this family.
    """
    if not is_split(args):
        return None
    small = stand_in(bare_model(model), args.device)
    if small is None:
        logger.warning(
            "model: no small %s can be made, so its head, dropout and packing are not tried before "
            "training; train a few steps on one GPU without DeepSpeed or FSDP, which tries them",
            type(bare_model(model)).__name__,
        )
        return None
    if args.disable_dropout:
        disable_dropout(small)
    patch_head(small, **args.head_settings)
    return small


def try_model(
    model: Any, small: Any, args: PreferenceConfig, autocast: AbstractContextManager
) -> None:
    """Raise ``UserError`` where the head, causality or dropout is not as training needs it.

    ``small`` is what `trial_model` gave for ``model``.
    """
    if is_split(args):
        if small is None:
            return
        model = small
    with autocast:  # flash attention takes no fp32
        check_head(model)
        if args.disable_dropout:
            check_no_dropout(model)


def fit_lengths(model: Any, parts: list[PairRows | None], *, exchanged: bool = False) -> None:
    """Check that the model has positions for all rows, and fix those that depend on a batch.

    Args:
        exchanged: whether answers also come after other prompts than their own.
    """
    longest = longest_row(parts, exchanged)
    check_positions(model, longest)
    fix_rope(bare_model(model), longest)


def check_positions(model: Any, longest: int) -> None:
    """Raise ``UserError`` for sequences that the model has no positions for.

    A model that computes positions of any number gets a warning: it was not trained on them. Which
    it is, a small model of its family shows.
    """
    bare = bare_model(model)
    limit = context_of(bare.config)
    if not isinstance(limit, int) or longest <= limit - 4:  # some count positions from 2 on
        return
    small = stand_in(bare)
    if small is None:
        fits = longest <= limit
    else:
        fix_rope(small, longest)
        fits = _runs(small, longest)
    if not fits:
        raise UserError(
            f"max_length: set it to {_most(small, limit)} or less; the data has a sequence of "
            f"{longest:,} tokens, and {type(bare).__name__} has positions for {limit:,}"
        )
    if longest > limit:
        logger.warning(
            "max_length: set it to %d, unless longer sequences are meant; the data has one of %d "
            "tokens, and the model's config names no more positions than that",
            limit,
            longest,
        )


def _most(small: Any, limit: int) -> int:
    """The longest sequence that the model takes, of the few lengths around its limit."""
    lengths = [limit - less for less in range(4)]
    return next((n for n in lengths if small is not None and _runs(small, n)), lengths[-1])


@torch.no_grad()
def _runs(model: Any, length: int) -> bool:
    try:
        ids = torch.full((1, length), 5, device=model.device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def check_learns(model: Any) -> None:
    """Raise ``UserError`` for a model of which no parameter trains."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if hasattr(model, "get_base_model"):
        raise UserError(
            "model: load its adapter with is_trainable=True (PeftModel.from_pretrained), or call "
            "model.set_requires_grad(model.active_adapter); nothing of it learns as it is"
        )
    raise UserError(
        "model: call model.requires_grad_(True), or set use_peft: true to train an adapter; every "
        "parameter is frozen, so nothing would learn"
    )
