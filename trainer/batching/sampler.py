"""A tokenized data set as the planner and the loader see it: lengths, rows, one rank's batches."""

from __future__ import annotations

from collections.abc import Iterator

from transformers.trainer_pt_utils import BatchRebalanceSampler

from ..data.table import FILLER_ID
from .planner import Plan, Planner


class PairBatches(BatchRebalanceSampler):
    """Batch sampler over one rank's share of every global micro-batch.

    It derives from transformers' rank-aware batch sampler for the sake of `Trainer`, which leaves
    those unsharded. A rank left without a pair gets the micro-batch's shortest as a filler: index
    ``-1 - i`` stands for pair i with weight zero.

    Args:
        planner: of the whole data set, for all ranks.
        rank: this process's place among the planner's ranks.
    """

    def __init__(self, planner: Planner, rank: int = 0) -> None:
        self.planner, self.rank = planner, rank
        self.drop_last = planner.drop_last
        self.epoch = 0
        self._plans: dict[int, Plan] = {}

    def __len__(self) -> int:
        return self.planner.micro_batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        plan = self.plan
        for micro_batch in range(len(plan)):
            yield plan.share(micro_batch, self.rank) or [FILLER_ID - plan.shortest(micro_batch)]

    @property
    def plan(self) -> Plan:
        """The epoch's plan, made once."""
        if self.epoch not in self._plans:
            self._plans = {self.epoch: self.planner.plan(self.epoch)}
        return self._plans[self.epoch]

    @property
    def max_pairs_per_rank(self) -> int:
        """The most pairs (a filler counts) any rank has in a micro-batch of this epoch."""
        return max(1, self.plan.most_pairs)
