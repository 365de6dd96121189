"""The rewards of an evaluation's pairs, for the user's ``compute_metrics`` and the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import EvalPrediction


class RewardMetrics:
    """Keeps each pair's rewards on the device, and gives them to ``compute_metrics`` at the end.

    Args:
        samples: how many pairs' margins to keep after that.

    Attributes:
        margins: of the first pairs in the data's order, at the last evaluation.
    """

    def __init__(
        self, compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None, samples: int = 0
    ) -> None:
        self.compute_metrics = compute_metrics
        self.samples = samples
        self.margins: list[float] = []
        self._parts: list[Tensor] = []

    @property
    def _is_wanted(self) -> bool:
        return self.compute_metrics is not None or self.samples > 0

    def add(self, pair_ids: Tensor, out: Any) -> None:
        """A micro-batch: ids [P], fillers below 0, and its `ObjectiveOutput`."""
        if self._is_wanted:
            columns = (
                pair_ids.double(),
                out.chosen_rewards.double(),
                out.rejected_rewards.double(),
            )
            self._parts.append(torch.stack([column.detach() for column in columns], dim=1))

    def figures(self, prefix: str, ranks: int) -> dict[str, Any]:
        """What ``compute_metrics`` says of the pairs since the last call; a collective."""
        if not self._is_wanted:
            return {}
        parts, self._parts = self._parts, []
        found = torch.cat(parts).cpu().numpy() if parts else np.zeros((0, 3))
        gathered: list[Any] = [found]
        if ranks > 1:
            gathered = [None] * ranks
            dist.all_gather_object(gathered, found)
        rows = np.concatenate(gathered)
        rows = rows[rows[:, 0] >= 0]
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        first = rows[: self.samples]
        self.margins = (first[:, 1] - first[:, 2]).tolist()
        if self.compute_metrics is None:
            return {}
        labels = np.zeros(len(rows), np.int64)
        metrics = self.compute_metrics(EvalPrediction(predictions=rows[:, 1:], label_ids=labels))
        return {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
            for name, value in metrics.items()
        }
