"""What a data loader needs: one rank's batches, and workers that outlive a SIGTERM to the job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

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


def sheltered(loader: Any) -> Any:
    """The data loader, whose workers outlive a SIGTERM that is sent to all processes of a run.

    Schedulers send it so, and a worker's death would end training before its checkpoint.
    """
    base = getattr(loader, "base_dataloader", loader)  # accelerate's keep torch's own inside
    start = base.worker_init_fn
    if base.num_workers and not (isinstance(start, partial) and start.func is _start_worker):
        base.worker_init_fn = partial(_start_worker, start)
    return loader


def _start_worker(start: Any, worker: int) -> None:
    """Heed SIGTERM from the parent alone, which so ends the workers that it no longer needs."""
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent.pid,), daemon=True).start()
    if start is not None:
        start(worker)


def _end_with(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
