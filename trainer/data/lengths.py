"""Tokens of every pair's parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class PairLengths:
    """Tokens of every pair's parts, [pairs] int64 each."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    @cached_property
    def shared(self) -> np.ndarray:
        """[pairs] prompt, chosen and rejected tokens."""
        return self.prompt + self.chosen + self.rejected

    def alone(self, layout: str) -> np.ndarray:
        """[pairs] tokens the decoder computes for each pair when it is by itself.

        Args:
            layout: "padded", "packed" (two sequences) or "prefix_shared" (one prompt for both).
        """
        if layout == "padded":
            return 2 * (self.prompt + np.maximum(self.chosen, self.rejected))
        return self.shared + self.prompt if layout == "packed" else self.shared
