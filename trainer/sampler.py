"""Which pairs run together: steps, global micro-batches, and each rank's share.

The order of pairs, the steps and their global micro-batches follow from seed and epoch alone; each
global micro-batch is then dealt over the ranks. So the number of ranks changes nothing in what an
objective sees, and a step is exactly the configured number of pairs (the last may be smaller).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import BatchRebalanceSampler

FILLER_ID = -1


class PairBatches(BatchRebalanceSampler):
    """Batch sampler over one rank's share of every global micro-batch.

    It derives from transformers' rank-aware batch sampler for the sake of `Trainer`, which leaves
    those unsharded. A rank left without a pair gets the micro-batch's first one as a filler:
    index ``-1 - i`` stands for pair i with weight zero.

    Args:
        pairs: pairs in the data set.
        per_rank: pairs a rank takes per micro-batch.
        rank, ranks: this process's place.
        seed: of the order; None keeps the data set's order.
        drop_last: leave out a last global micro-batch that is not full.
    """

    def __init__(
        self,
        pairs: int,
        per_rank: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        seed: int | None = 0,
        drop_last: bool = False,
    ) -> None:
        self.pairs, self.per_rank = pairs, per_rank
        self.rank, self.ranks = rank, ranks
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.pairs, self.per_rank * self.ranks)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        order = self._order()
        size = self.per_rank * self.ranks
        for batch in range(len(self)):
            together = order[batch * size : (batch + 1) * size]
            yield together[self.rank :: self.ranks] or [FILLER_ID - together[0]]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(self.pairs))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.pairs, generator=generator).tolist()


class PairRows(Dataset):
    """A tokenized data set as `PairBatches` indexes it: rows with their ``pair_id``."""

    def __init__(self, dataset: Any) -> None:
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        self.dataset = dataset.select_columns(columns).with_format("numpy")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        wanted = [index if index >= 0 else FILLER_ID - index for index in indices]
        rows = self.dataset[wanted]
        return [
            {
                **{name: column[i] for name, column in rows.items()},
                "pair_id": index if index >= 0 else FILLER_ID,
            }
            for i, index in enumerate(indices)
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]
