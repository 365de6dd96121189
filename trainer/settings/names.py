"""Values and names that settings may take, each in one place."""

from __future__ import annotations

from typing import Literal, get_args

from ...kernels.checks import BACKENDS as BACKENDS
from ...kernels.linear_logprob.types import TAILS as TAILS

Layout = Literal["padded", "packed", "prefix_shared"]
"""How pairs lie in the rows of a batch: two padded sequences, two sequences one after another, or
one prompt followed by both answers. `packing.collator.PairCollator` has the details."""

PACKINGS: tuple[str, ...] = (*get_args(Layout), "auto")
"""A layout, or "auto" for the fastest that is exact for the model."""

DTYPES = ("float32", "bfloat16", "float16")
"""Of a model's weights, by torch's names."""

SIDES = ("chosen", "rejected")
METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    *(f"{figure}/{side}" for figure in ("rewards", "logps", "logits", "lengths") for side in SIDES),
    *(f"logps/{side}_mean" for side in SIDES),
    "nll_loss",
    "margin/mean",
    "margin/std",
)
"""What `PreferenceMetrics` reports, of training and of evaluation."""
