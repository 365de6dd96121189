"""What a plan means for a run, in a few numbers, before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .planner import Planner


@dataclass(frozen=True)
class PlanSummary:
    """The first epoch of a run; tokens are the decoder's, over all ranks."""

    layout: str
    ranks: int
    pairs_per_step: int
    micro_batches: int  # of a whole step
    steps_per_epoch: int
    tokens: int  # in the layout in use
    padded_tokens: int  # of the same micro-batches, padded
    step_balance: float  # the largest rank's tokens over the mean, averaged over steps
    micro_batch_balance: float  # the same over micro-batches
    largest_tokens: int  # of a rank in a micro-batch
    largest_pairs: int

    def lines(self) -> list[str]:
        """Two lines of text."""
        times = f" in {self.micro_batches} micro-batches" if self.micro_batches > 1 else ""
        steps = f"{self.steps_per_epoch:,} step" + "s" * (self.steps_per_epoch > 1)
        first = (
            f"plan: {self.pairs_per_step:,} pairs a step{times}, {steps} an epoch; "
            f"{self.tokens / self.steps_per_epoch:,.0f} tokens a step, {self.tokens:,} an epoch"
        )
        if self.layout != "padded":
            share = self.tokens / self.padded_tokens
            first += f" ({self.layout}), {share:.2f} of the {self.padded_tokens:,} padded"
        second = ""
        if self.ranks > 1:
            second = (
                f"busiest of {self.ranks} ranks {self.step_balance:.3f} of the mean per step, "
                f"{self.micro_batch_balance:.3f} per micro-batch; "
            )
        second += (
            f"largest micro-batch of a rank {self.largest_tokens:,} tokens, at most "
            f"{self.largest_pairs} pairs"
        )
        return [first, f"  {second}"]

    def as_dict(self) -> dict[str, Any]:
        """For ``run.json``."""
        return asdict(self)


def summarise(planner: Planner) -> PlanSummary:
    """The summary of the planner's first epoch."""
    plan = planner.plan(0)
    tokens = plan.tokens(planner.layout)
    per_step = np.add.reduceat(tokens, plan.steps[:-1])
    return PlanSummary(
        layout=planner.layout,
        ranks=planner.ranks,
        pairs_per_step=planner.pairs_per_step,
        micro_batches=planner.micro_batches,
        steps_per_epoch=planner.steps_per_epoch,
        tokens=int(tokens.sum()),
        padded_tokens=int(plan.tokens("padded").sum()),
        step_balance=busiest(per_step),
        micro_batch_balance=busiest(tokens),
        largest_tokens=int(tokens.max()),
        largest_pairs=plan.most_pairs,
    )


def busiest(tokens: np.ndarray) -> float:
    """The largest rank's tokens [.., R] over the mean rank's: time, where ranks wait for it."""
    return round(float(tokens.max(axis=1).sum() / tokens.mean(axis=1).sum()), 4)
