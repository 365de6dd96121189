"""Speed and memory of a run: rates between logs, share of the chips' peak, peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import Parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    def pause(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

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
            counts: over all ranks, ``pairs``; decoder tokens in the batches' layout, all of them
                (``computed_tokens``), without padding (``tokens``), and as padded batches would
                have them (``padded_tokens``); tokens through the head (``scored``).

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
    tables = {id(head), id(cast(Any, model.get_input_embeddings()).weight)}
    return sum(_flops(p) for p in model.parameters() if id(p) not in tables), _flops(head)


def _flops(parameter: Parameter) -> float:
    """Operations per token, forward and backward, of a parameter that multiplies it."""
    return (6.0 if parameter.requires_grad else 4.0) * _size(parameter)


def _size(parameter: Any) -> int:
    """Elements of a parameter, also where ZeRO-3 has taken it apart or it is packed in 4 bits."""
    if getattr(parameter, "quant_state", None) is not None:
        return math.prod(parameter.quant_state.shape)
    return getattr(parameter, "ds_numel", parameter.numel())
