"""Values and names that settings may take, each in one place."""

from __future__ import annotations

from ...kernels.checks import BACKENDS as BACKENDS
from ...kernels.linear_logprob.types import TAILS as TAILS

PACKINGS = ("padded", "packed", "prefix_shared", "auto")

SIDES = ("chosen", "rejected")
NAMES = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    *(f"{what}/{side}" for what in ("rewards", "logps", "logits", "lengths") for side in SIDES),
    "margin/mean",
    "margin/std",
)
"""What `PreferenceMetrics` reports, of training and of evaluation."""
