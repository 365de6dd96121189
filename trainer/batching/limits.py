"""Micro-batches that fit in memory: more of them, with the pairs of a step as they are."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from ..data.table import PairLengths
from ..errors import UserError
from .planner import Planner

if TYPE_CHECKING:
    from ..objectives import Objective
    from ..settings.config import PreferenceConfig

logger = logging.getLogger(__name__)


def training_planner(
    args: PreferenceConfig, objective: Objective, lengths: PairLengths, layout: str
) -> Planner:
    """The planner these settings describe."""
    return Planner(
        lengths,
        args.pairs_per_step,
        args.gradient_accumulation_steps,
        ranks=max(1, args.world_size),
        seed=args.seed if args.data_seed is None else args.data_seed,
        coupled=objective.couples_pairs,
        layout=layout,
        drop_last=args.dataloader_drop_last,
    )


def fitted(args: PreferenceConfig, objective: Objective, planner: Planner) -> Planner:
    """The planner with as many micro-batches a step as ``max_tokens_per_micro_batch`` asks for.

    Where that is more than configured, ``gradient_accumulation_steps`` is raised in ``args``, so
    call this before anything else reads it. ``pairs_per_step`` stays.
    """
    limit = args.max_tokens_per_micro_batch
    if limit is None:
        return planner
    epochs = math.ceil(args.num_train_epochs)
    if args.max_steps > 0:
        epochs = math.ceil(args.max_steps / planner.steps_per_epoch)
    found = with_limit(planner, limit, epochs)
    before, after = planner.micro_batches, found.micro_batches
    if after > before:
        raise_accumulation(args, after)
        coupled = ""
        if objective.couples_pairs:
            sizes = [planner.pairs_per_step / micro_batches for micro_batches in (before, after)]
            coupled = (
                f"; {objective.name} couples the pairs of a global micro-batch and sees "
                f"{sizes[1]:.3g} of them at a time instead of {sizes[0]:.3g}"
            )
        if args.process_index == 0:
            logger.warning(
                "gradient_accumulation_steps: %d instead of %d, so that no rank's micro-batch has "
                "more than %d tokens (%s); a step keeps its %d pairs%s",
                *(after, before, limit, planner.layout, planner.pairs_per_step, coupled),
            )
    return found


def with_limit(planner: Planner, limit: int, epochs: int) -> Planner:
    """The planner with the fewest micro-batches, no fewer than now, in which every rank's fit.

    Args:
        limit: tokens a rank computes in a micro-batch, in the planner's layout.
        epochs: how many, from the first, must fit.

    Raises:
        UserError: a pair is larger than the limit.
    """
    alone = planner.lengths.alone(planner.layout)
    if not len(alone):
        return planner
    longest = int(alone.argmax())
    if alone[longest] > limit:
        raise UserError(
            f"max_tokens_per_micro_batch: pair {longest} of train_dataset takes {alone[longest]:,} "
            f"tokens by itself ({planner.layout}), more than {limit:,}; raise it, or lower "
            "max_length"
        )
    # One pair per rank and micro-batch is as far as it goes, and that fits.
    for micro_batches in range(planner.micro_batches, planner.pairs_per_step // planner.ranks):
        found = replace(planner, micro_batches=micro_batches)
        if all(found.plan(e).tokens(planner.layout).max() <= limit for e in range(epochs)):
            return found
    return replace(planner, micro_batches=planner.pairs_per_step // planner.ranks)


def raise_accumulation(args: PreferenceConfig, micro_batches: int) -> None:
    """Set ``gradient_accumulation_steps``, the pairs of a step kept, and in DeepSpeed's config."""
    args.keep_pairs_per_step()
    before, args.gradient_accumulation_steps = args.gradient_accumulation_steps, micro_batches
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    if deepspeed is None:  # accelerate's own is filled in by Trainer, later
        return
    key, total = "gradient_accumulation_steps", "train_batch_size"
    if deepspeed.config.get(key) == before:
        deepspeed.config[key] = micro_batches
        if isinstance(deepspeed.config.get(total), int):
            deepspeed.config[total] = deepspeed.config[total] // before * micro_batches
