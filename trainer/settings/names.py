"""Values and names that settings may take, each in one place."""

from __future__ import annotations

from ...kernels.checks import BACKENDS as BACKENDS
from ...kernels.linear_logprob.types import TAILS as TAILS

PACKINGS = ("padded", "packed", "prefix_shared", "auto")
DTYPES = ("float32", "bfloat16", "float16")
"""Of a model's weights, by torch's names."""

SIDES = ("chosen", "rejected")
METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    *(f"{figure}/{side}" for figure in ("rewards", "logps", "logits", "lengths") for side in SIDES),
    "margin/mean",
    "margin/std",
)
"""What `PreferenceMetrics` reports, of training and of evaluation."""
