"""Metrics summed on the device, reduced over ranks once per logging step."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives import ObjectiveOutput
from ..settings.names import SIDES

TOKENS = ("computed_tokens", "tokens", "padded_tokens")
"""What `PairCollator` counts in a batch, as `Throughput.report` takes it."""


class PreferenceMetrics:
    """Sums over the pairs since the last report, for training or for evaluation.

    Names as users chart them already; every figure is a mean over pairs, but for ``logits/*``
    (over completion tokens), ``margin/std`` and the head's figures (over micro-batches).
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Add each value's sum, without waiting for the device."""
        for name, value in values.items():
            total = value.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def add_pairs(self, out: ObjectiveOutput, mean_logits: Tensor, cu_seqlens: Tensor) -> None:
        """Add one micro-batch of P pairs.

        Args:
            mean_logits: [N]. cu_seqlens: [2P + 1].
        """
        real = out.real
        gaps = out.chosen_rewards - out.rejected_rewards
        per_pair = {
            "pairs": torch.ones_like(out.losses),
            "loss": out.losses,
            "rewards/chosen": out.chosen_rewards,
            "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": (gaps > 0).double(),
            "rewards/margins": gaps,
            "logps/chosen": out.chosen_mean_logps,
            "logps/rejected": out.rejected_mean_logps,
            "lengths/chosen": out.chosen_lengths.double(),
            "lengths/rejected": out.rejected_lengths.double(),
            "margin/mean": out.target_margins,
            "margin/square": out.target_margins.double().square(),
        }
        self.add(**{name: torch.where(real, value, 0) for name, value in per_pair.items()})
        logits = segment_sums(mean_logits.detach(), cu_seqlens) * real.repeat(2)
        chosen, rejected = logits.chunk(2)
        self.add(**{"logits/chosen": chosen, "logits/rejected": rejected})

    def add_tokens(self, decoder_tokens: Tensor) -> None:
        """Add one micro-batch's ``decoder_tokens`` [3], see `PairCollator`."""
        self.add(**dict(zip(TOKENS, decoder_tokens, strict=True)))

    def state(self) -> dict[str, Tensor]:
        """What was added so far; no later `add` changes it."""
        return dict(self._sums)

    def load(self, state: dict[str, Tensor]) -> None:
        """Go back to a `state`."""
        self._sums = dict(state)

    def report(self, prefix: str = "") -> tuple[dict[str, float], dict[str, float]]:
        """Means over all ranks under ``prefix`` and totals of pairs and tokens, since the last."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}, {}
        names = sorted(sums)
        totals = torch.stack([sums[name] for name in names])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        total = dict(zip(names, totals.tolist(), strict=True))
        counts = {name: total.pop(name, 0.0) for name in ("pairs", "batches", *TOKENS)}
        pairs = counts["pairs"]
        if not pairs:
            return {}, counts
        square = total.pop("margin/square") / pairs
        variance = square - (total["margin/mean"] / pairs) ** 2
        scored = {side: total[f"lengths/{side}"] for side in SIDES}
        counts["scored"] = sum(scored.values())
        means = {
            name: value / (counts["batches"] if name.startswith("head/") else pairs)
            for name, value in total.items()
            if not name.startswith("logits/")
        }
        means |= {f"logits/{s}": total[f"logits/{s}"] / max(n, 1.0) for s, n in scored.items()}
        means["margin/std"] = math.sqrt(max(variance, 0.0))
        return {f"{prefix}{name}": value for name, value in means.items()}, counts


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [S] of ``values`` [N] over segments [S + 1]."""
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0)
