"""The plan of a run: the planner its settings describe, its token limit, and its summary."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.table import PairLengths, TreeLengths
from ..errors import UserError
from .planner import Planner

if TYPE_CHECKING:
    from ..objectives import Objective
    from ..settings.config import PreferenceConfig

logger = logging.getLogger(__name__)


def planner_for(
    settings: PreferenceConfig,
    lengths: PairLengths,
    layout: str,
    objective: Objective,
    *,
    ranks: int | None = None,
    training: bool = True,
) -> Planner:
    """The planner that these settings describe, before any limit on tokens.

    Args:
        lengths: of the data set's pairs.
        layout: of the rows.
        objective: whose coupling of pairs, or of the answers to a prompt, decides what is dealt.
        ranks: in place of those of this launch, ``data_parallel_size``.
        training: False for evaluation, which keeps the data set's order.
    """
    every_rank = settings.data_parallel_size if ranks is None else ranks
    units = TreeLengths(lengths) if objective.ranks_lists else lengths
    if not training:
        pairs = settings.eval_batch_size * every_rank
        return Planner(units, pairs, 1, every_rank, seed=None, layout=layout)
    pairs_per_step = settings.pairs_per_step
    if ranks is not None:
        per_rank = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        pairs_per_step = per_rank * ranks
    return Planner(
        units,
        pairs_per_step,
        settings.gradient_accumulation_steps,
        ranks=every_rank,
        seed=settings.seed if settings.data_seed is None else settings.data_seed,
        coupled=objective.couples_pairs,
        layout=layout,
        drop_last=settings.dataloader_drop_last,
    )


def fit_micro_batches(
    settings: PreferenceConfig, objective: Objective, planner: Planner
) -> Planner:
    """The planner with as many micro-batches a step as ``max_tokens_per_micro_batch`` asks for.

    If that is more than configured, ``gradient_accumulation_steps`` is raised in ``settings``, so
    call this before anything else reads it. ``pairs_per_step`` stays.
    """
    limit = settings.max_tokens_per_micro_batch
    if limit is None:
        return planner
    epochs = math.ceil(settings.num_train_epochs)
    if settings.max_steps > 0:
        epochs = math.ceil(settings.max_steps / planner.steps_per_epoch)
    # Ranks that share a row have a part of it each.
    fitted = with_limit(planner, limit * settings.sequence_parallel_size, epochs)
    before, after = planner.micro_batches, fitted.micro_batches
    if after > before:
        raise_accumulation(settings, after)
        coupled = ""
        if objective.couples_pairs:
            sizes = [planner.pairs_per_step / micro_batches for micro_batches in (before, after)]
            coupled = (
                f"; {objective.name} couples the pairs of a global micro-batch and sees "
                f"{sizes[1]:.3g} of them at a time instead of {sizes[0]:.3g}"
            )
        if settings.process_index == 0:
            logger.warning(
                "gradient_accumulation_steps: %d instead of %d, so that no rank's micro-batch has "
                "more than %d tokens (%s); a step keeps its %d %ss%s",
                *(after, before, limit, planner.layout, planner.pairs_per_step),
                *(planner.lengths.noun, coupled),
            )
    return fitted


def with_limit(planner: Planner, limit: int, epochs: int) -> Planner:
    """The planner with the fewest micro-batches, no fewer than now, in which every rank's fit.

    Args:
        limit: tokens a rank computes in a micro-batch, in the planner's layout.
        epochs: how many, from the first, must fit.

    Raises:
        UserError: a pair is larger than the limit, or a tree where none is cut.
    """
    alone = planner.lengths.alone(planner.layout)
    if not len(alone):
        return planner
    longest = int(alone.argmax())
    if alone[longest] > limit:
        raise UserError(
            f"max_tokens_per_micro_batch: {planner.lengths.noun} {longest} of train_dataset takes "
            f"{alone[longest]:,} tokens by itself ({planner.layout}), more than {limit:,}; raise "
            "it, or lower max_length"
        )
    planner = replace(planner, most_tokens=limit)
    # One pair per rank and micro-batch is as far as it goes, and that fits.
    for micro_batches in range(planner.micro_batches, planner.pairs_per_step // planner.ranks):
        candidate = replace(planner, micro_batches=micro_batches)
        if all(candidate.plan(e).tokens(planner.layout).max() <= limit for e in range(epochs)):
            return candidate
    return replace(planner, micro_batches=planner.pairs_per_step // planner.ranks)


def raise_accumulation(settings: PreferenceConfig, micro_batches: int) -> None:
    """Set ``gradient_accumulation_steps``, the pairs of a step kept, and in DeepSpeed's config."""
    settings.keep_pairs_per_step()
    before, settings.gradient_accumulation_steps = (
        settings.gradient_accumulation_steps,
        micro_batches,
    )
    deepspeed = getattr(settings, "hf_deepspeed_config", None)
    if deepspeed is None:  # accelerate's own is filled in by Trainer, later
        return
    key, total = "gradient_accumulation_steps", "train_batch_size"
    if deepspeed.config.get(key) == before:
        deepspeed.config[key] = micro_batches
        if isinstance(deepspeed.config.get(total), int):
            deepspeed.config[total] = deepspeed.config[total] // before * micro_batches


@dataclass(frozen=True)
class PlanSummary:
    """The first epoch of a run; tokens are the decoder's, over all ranks."""

    layout: str
    ranks: int
    pairs_per_step: int  # or prompts, see ``noun``
    micro_batches: int  # of a whole step
    steps_per_epoch: int
    tokens: int  # in the layout in use
    padded_tokens: int  # of the same micro-batches, padded pair by pair
    step_balance: float  # the largest rank's tokens over the mean, averaged over steps
    micro_batch_balance: float  # the same over micro-batches
    largest_tokens: int  # of a rank in a micro-batch
    largest_pairs: int  # or prompts, or answers
    pairs: int
    trees: int
    cut_trees: int  # how often a prompt runs again, as its tree was cut
    pair_tokens: int  # of the same micro-batches, with nothing shared between pairs
    noun: str = "pair"  # what a step is so many of: "pair", "prompt" or "answer"
    sharing: int = 1  # ranks that share rows, and are one of ``ranks`` together

    def lines(self) -> list[str]:
        """Two lines of text, or three where pairs share prompts."""
        times = f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        steps = f"{self.steps_per_epoch:,} step" + "s" * (self.steps_per_epoch > 1)
        first = (
            f"plan: {self.pairs_per_step:,} {self.noun}s a step{times}, {steps} an epoch; "
            f"{self.tokens / self.steps_per_epoch:,.0f} tokens a step, {self.tokens:,} an epoch"
        )
        if self.layout != "padded":
            share = self.tokens / self.padded_tokens
            first += f" ({self.layout}), {share:.2f} of the {self.padded_tokens:,} padded"
        second, one, several = "", "rank", "ranks"
        if self.sharing > 1:
            one, several = (f"{name} of {self.sharing} ranks" for name in ("group", "groups"))
        if self.ranks > 1:
            second = (
                f"busiest of {self.ranks} {several} {self.step_balance:.3f} of the mean per step, "
                f"{self.micro_batch_balance:.3f} per micro-batch; "
            )
        second += (
            f"largest micro-batch of a {one} {self.largest_tokens:,} tokens, at most "
            f"{self.largest_pairs} {self.noun}s"
        )
        return [first, f"  {second}", *self._of_trees()]

    def _of_trees(self) -> list[str]:
        if self.trees == self.pairs:
            return []
        line = (
            f"  {self.trees:,} trees, {self.pairs:,} pairs, "
            f"{self.pair_tokens / self.tokens:.1f} times fewer tokens than pair by pair"
        )
        if self.cut_trees:
            line += f"; trees are cut {self.cut_trees:,} times, their prompts repeated"
        return [line]

    def as_dict(self) -> dict[str, Any]:
        """For ``run.json``."""
        return asdict(self)


def summarise(planner: Planner, sharing: int = 1) -> PlanSummary:
    """The summary of the planner's first epoch; each of its ranks are ``sharing`` real ones."""
    plan = planner.plan(0)
    tokens = plan.tokens(planner.layout)
    apart = replace(plan, lengths=plan.lengths.apart)
    trees, parts = plan.trees
    per_step = np.add.reduceat(tokens, plan.steps[:-1])
    return PlanSummary(
        layout=planner.layout,
        ranks=planner.ranks,
        pairs_per_step=planner.pairs_per_step,
        micro_batches=planner.micro_batches,
        steps_per_epoch=planner.steps_per_epoch,
        tokens=int(tokens.sum()),
        padded_tokens=int(apart.tokens("padded").sum()),
        step_balance=busiest(per_step),
        micro_batch_balance=busiest(tokens),
        largest_tokens=int(tokens.max()),
        largest_pairs=plan.most_pairs,
        pairs=len(plan.order),
        trees=trees,
        cut_trees=parts - trees,
        pair_tokens=int(apart.tokens(planner.layout).sum()),
        noun=planner.lengths.noun,
        sharing=sharing,
    )


def busiest(tokens: np.ndarray) -> float:
    """The largest rank's tokens [.., R] over the mean rank's: time, where ranks wait for it."""
    return round(float(tokens.max(axis=1).sum() / tokens.mean(axis=1).sum()), 4)
