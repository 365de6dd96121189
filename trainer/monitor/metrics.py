"""Metrics summed on the device, reduced over ranks once per logging step; speed and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..objectives import ObjectiveOutput
from ..objectives.terms import by_edges
from ..settings.names import SIDES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TOKENS = ("computed_tokens", "tokens", "padded_tokens")
"""What `PairCollator` counts in a batch, as `Throughput.report` takes it."""

COUNTS = ("pairs", "items", "batches", "num_tokens", *TOKENS)
"""What is reported as a total, and not as a mean."""

EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts")
MET = ("num_experts_per_tok", "top_k_experts", "moe_topk")
"""Names in configs for the number of experts, and for how many of them a token meets."""


class PreferenceMetrics:
    """Sums over the pairs since the last report, for training or for evaluation.

    Names and meanings as TRL has them; every figure is a mean over pairs (of single answers
    ``.../chosen`` over desirable ones, ``.../rejected`` over the others), but for ``logits/*`` and
    ``entropy`` (over completion tokens), ``nll_loss`` and ``mean_token_accuracy`` (over the chosen
    ones), ``margin/std``, and ``head/*`` and ``aux_loss`` (over micro-batches). ``logps/*`` are the
    sums or the means that the objective compares; ``logps/*_mean`` are the means whatever it is.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Add each value's sum, without waiting for the device."""
        for name, value in values.items():
            total = value.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def add_pairs(
        self,
        out: ObjectiveOutput,
        mean_logits: Tensor,
        cu_seqlens: Tensor,
        edges: Tensor | None = None,
    ) -> None:
        """Add one micro-batch of P pairs of S sequences.

        Args:
            mean_logits: [N]. cu_seqlens: [S + 1]. edges: [P, 2], see `Objective`.
        """
        real = out.real
        gaps = out.chosen_rewards - out.rejected_rewards
        per_pair = {
            "pairs": torch.ones_like(out.losses),
            "rewards/accuracies": (gaps > 0).double(),
            "rewards/margins": gaps,
            "margin/mean": out.target_margins,
            "margin/square": out.target_margins.double().square(),
        }
        self.add(**{name: torch.where(real, value, 0) for name, value in per_pair.items()})
        logits = by_edges(segment_sums(mean_logits.detach(), cu_seqlens), edges)
        of_sides = {
            "count/": torch.ones_like(logits),
            "rewards/": torch.cat([out.chosen_rewards, out.rejected_rewards]),
            "logps/": torch.cat([out.chosen_logps, out.rejected_logps]),
            "logps/_mean": torch.cat([out.chosen_mean_logps, out.rejected_mean_logps]),
            "lengths/": torch.cat([out.chosen_lengths, out.rejected_lengths]).double(),
            "logits/": logits,
        }
        for name, values in of_sides.items():
            kind, _, suffix = name.partition("/")
            sides = torch.where(out.sides, values, 0).chunk(2)
            self.add(**{f"{kind}/{s}{suffix}": v for s, v in zip(SIDES, sides, strict=True)})
        nll = -out.chosen_mean_logps * out.chosen_lengths
        self.add(nll_loss=torch.where(out.sides.chunk(2)[0], nll, 0))

    def add_figures(
        self,
        out: ObjectiveOutput,
        figures: Tensor,
        cu_seqlens: Tensor,
        edges: Tensor | None = None,
    ) -> None:
        """Add one micro-batch's ``figures`` [3, N], see `ScoredTokens`."""
        entropy, correct = (
            by_edges(segment_sums(row.detach(), cu_seqlens), edges) * out.sides
            for row in figures[1:]
        )
        self.add(entropy=entropy, mean_token_accuracy=correct.chunk(2)[0])

    def add_loss(self, loss: Tensor, count: Tensor) -> None:
        """Add one micro-batch's mean loss over ``count`` pairs or lists."""
        self.add(loss=loss.double() * count, items=count)

    def add_tokens(self, decoder_tokens: Tensor) -> None:
        """Add one micro-batch's ``decoder_tokens`` [3], see `PairCollator`."""
        self.add(**dict(zip(TOKENS, decoder_tokens, strict=True)))

    def totals(self, group: Any = None) -> dict[str, float]:
        """The sums since the last report over ``group``, None for all ranks; a collective."""
        names = sorted(self._sums)
        if not names:
            return {}
        totals = torch.stack([self._sums[name] for name in names])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals, group=group)
        return dict(zip(names, totals.tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """What was added so far; no later `add` changes it."""
        return dict(self._sums)

    def load(self, state: dict[str, Tensor]) -> None:
        """Go back to a `state`."""
        self._sums = dict(state)

    def report(
        self, prefix: str = "", group: Any = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Means over all ranks under ``prefix`` and totals of pairs and tokens, since the last.

        ``group`` are the ranks that have other pairs, None for all.
        """
        total = self.totals(group)
        self._sums = {}
        if not total:
            return {}, {}
        counts = {name: total.pop(name, 0.0) for name in COUNTS}
        answers = {side: total.pop(f"count/{side}", 0.0) for side in SIDES}
        pairs = counts["pairs"]
        if not pairs:  # fillers, or a loss that a subclass computed without our own
            items = counts["items"]
            return ({f"{prefix}loss": total["loss"] / items} if items else {}), counts
        square = total.pop("margin/square") / pairs
        variance = square - (total["margin/mean"] / pairs) ** 2
        scored = {side: total[f"lengths/{side}"] for side in SIDES}
        counts["scored"] = sum(scored.values())
        over = {name: answers[side] for name in total for side in SIDES if f"/{side}" in name}
        over |= {name: counts["batches"] for name in total if name.startswith(("head/", "aux_"))}
        over |= {f"logits/{side}": scored[side] for side in SIDES}
        over |= dict.fromkeys(("nll_loss", "mean_token_accuracy"), scored["chosen"])
        over |= {"entropy": counts["scored"], "loss": counts["items"]}
        means = {name: value / max(over.get(name, pairs), 1.0) for name, value in total.items()}
        if sum(answers.values()) <= pairs:  # single answers
            margin = means["rewards/chosen"] - means["rewards/rejected"]
            means = {name: value for name, value in means.items() if over.get(name, pairs)}
            means["rewards/margins"] = margin
            if not all(answers.values()):
                del means["rewards/margins"]
        means["margin/std"] = math.sqrt(max(variance, 0.0))
        return {f"{prefix}{name}": value for name, value in means.items()}, counts


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums [S] of ``values`` [N] over segments [S + 1]."""
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), initial=0)


PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250, "A800": 312, "H800": 989}
"""Dense bf16 matrix throughput by GPU name, TFLOP/s, from the vendors' data sheets."""


class Throughput:
    """Tokens and pairs per second of all ranks, and the share of the chips' peak, between logs.

    Evaluation and saving do not count: see `paused`.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, ranks: int) -> None:
        self._decoder_flops, self._head_flops = flops_per_token(model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
        self._peak = None if peak is None else peak * 1e12 * ranks
        self._seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def restart(self, seconds: float = 0.0) -> None:
        """Start with so many seconds since the last report, whatever was measured before."""
        self._seconds, self._since = seconds, time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    @property
    def seconds(self) -> float:
        """Of training since the last report."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for what is not training; it runs again after if it ran before."""
        running = self._since is not None
        self.pause()
        try:
            yield
        finally:
            if running:
                self.start()

    def report(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Rates for what was done since the last report.

        Args:
            counts: sums over all ranks. ``pairs``; tokens through the head (``scored``); tokens
                through the decoder: all (``computed_tokens``), those that are no padding
                (``tokens``), and the number in padded batches (``padded_tokens``).

        Returns:
            ``pairs_per_s``, ``tokens_per_s`` (without padding), ``tokens/computed_vs_padded``
            (a share: what the layout saves), and ``mfu`` where the chip's peak is known.
        """
        with self.paused():
            seconds, self._seconds = self._seconds, 0.0
        tokens = counts.get("tokens", 0.0)
        if seconds <= 0 or not tokens:
            return {}
        rates = {"tokens_per_s": tokens / seconds, "pairs_per_s": counts["pairs"] / seconds}
        rates["tokens/computed_vs_padded"] = counts["computed_tokens"] / counts["padded_tokens"]
        if self._peak is not None:
            flops = self._decoder_flops * tokens + self._head_flops * counts["scored"]
            rates["mfu"] = flops / seconds / self._peak
        return rates


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def flops_per_token(model: PreTrainedModel) -> tuple[float, float]:
    """Operations of the decoder per token and of the head per scored token.

    The usual count: 6 per parameter that multiplies the token, 2 of them forward, 2 for its input's
    gradient and 2 for its own, which a frozen one (under LoRA) does without. Attention scores and
    recomputation are left out, and so is a reference model.
    """
    head = cast(Any, model.get_output_embeddings()).weight
    return sum(share * _flops(p) for p, share in decoder_weights(model)), _flops(head)


def decoder_weights(model: PreTrainedModel) -> list[tuple[Parameter, float]]:
    """Parameters between the embedding and the head, and the share of each that a token meets.

    That is 1, but for experts: the router sends a token to a few of them.
    """
    tables = {
        id(cast(Any, table).weight)
        for table in (model.get_output_embeddings(), model.get_input_embeddings())
    }
    config: Any = model.config.get_text_config()
    experts, met = (
        next((getattr(config, name) for name in names if hasattr(config, name)), None)
        for names in (EXPERTS, MET)
    )
    met = fmean(met) if isinstance(met, list) else met  # one for each layer

    def share(parameter: Any) -> float:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return met / experts if experts and met and len(shape) == 3 and shape[0] == experts else 1.0

    return [(p, share(p)) for p in model.parameters() if id(p) not in tables]


def _flops(parameter: Parameter) -> float:
    """Operations per token, forward and backward, of a parameter that multiplies it."""
    return (6.0 if parameter.requires_grad else 4.0) * _size(parameter)


def _size(parameter: Any) -> int:
    """Elements of a parameter, also where ZeRO-3 has taken it apart or it is packed in 4 bits."""
    if getattr(parameter, "quant_state", None) is not None:
        return math.prod(parameter.quant_state.shape)
    return getattr(parameter, "ds_numel", parameter.numel())
