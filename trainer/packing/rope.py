"""Rotary positions whose frequencies depend on the longest row of a batch: one factor for a run.

LongRoPE (Phi-3 to Phi-4) takes other factors where any position of a batch lies beyond the original
context; dynamic NTK another base. The log-probs of a pair would then depend on the pairs beside it.
Here the longest sequence of the data decides once, for all: servers of these models do the same
with their context length.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

FIXED = "default"
"""A kind of rotary positions that transformers never updates."""


def fix_rope(model: nn.Module, longest: int) -> None:
    """Make rotary modules keep the frequencies of sequences of ``longest`` tokens.

    0 stands for lengths that nobody knows: the frequencies are then those of short sequences. A
    second call changes nothing.
    """
    kinds = set()
    for module in model.modules():
        rope: Any = module
        kind = getattr(module, "rope_type", None)
        by_layer = kind if isinstance(kind, dict) else {None: kind}
        changing = {layer: name for layer, name in by_layer.items() if _changes(name)}
        for layer, name in changing.items():
            _call(rope, layer, max(longest, 1))
            kinds.add(name)
        if changing:
            kept = {layer: FIXED if layer in changing else n for layer, n in by_layer.items()}
            rope.rope_type = kept if isinstance(kind, dict) else FIXED
    if kinds:
        logger.warning(
            "rope: %s takes its frequencies from the longest row of a batch; this run keeps those "
            "of %s, so that a pair's log-probs do not depend on the pairs beside it",
            ", ".join(sorted(kinds)),
            f"sequences of {longest:,} tokens, its longest" if longest else "short sequences",
        )


def _changes(kind: Any) -> bool:
    return isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind)


@torch.no_grad()
def _call(rope: Any, layer: str | None, length: int) -> None:
    """Let the module update its frequencies for a sequence of this length."""
    prefix = "" if layer is None else f"{layer}_"
    frequencies = getattr(rope, f"{prefix}inv_freq")
    states = torch.zeros(1, 1, 1, device=frequencies.device)
    positions = torch.tensor([[length - 1]], device=frequencies.device)
    rope(states, positions, **({} if layer is None else {"layer_type": layer}))
