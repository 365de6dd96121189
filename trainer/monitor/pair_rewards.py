"""The rewards of an evaluation's pairs, for the user's own ``compute_metrics``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import EvalPrediction


class RewardMetrics:
    """Keeps each pair's rewards on the device, and gives them to ``compute_metrics`` at the end."""

    def __init__(self, compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None) -> None:
        self.compute_metrics = compute_metrics
        self._parts: list[Tensor] = []

    def add(self, pair_ids: Tensor, out: Any) -> None:
        """A micro-batch: ids [P], fillers below 0, and its `ObjectiveOutput`."""
        if self.compute_metrics is not None:
            columns = (
                pair_ids.double(),
                out.chosen_rewards.double(),
                out.rejected_rewards.double(),
            )
            self._parts.append(torch.stack([column.detach() for column in columns], dim=1))

    def figures(self, prefix: str, ranks: int) -> dict[str, Any]:
        """What ``compute_metrics`` says of the pairs since the last call; a collective."""
        if self.compute_metrics is None:
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
        labels = np.zeros(len(rows), np.int64)
        metrics = self.compute_metrics(EvalPrediction(predictions=rows[:, 1:], label_ids=labels))
        return {
            name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value
            for name, value in metrics.items()
        }
