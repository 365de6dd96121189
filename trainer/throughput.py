"""Speed and memory of a run: rates between logs, share of the chips' peak, peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

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

    def report(self, pairs: float, tokens: float, scored: float) -> dict[str, float]:
        """Rates for what was done since the last report.

        Args:
            tokens: through the decoder, padding left out. scored: of those, through the head.
        """
        with self.paused():
            seconds, self._seconds = self._seconds, 0.0
        if seconds <= 0 or not pairs:
            return {}
        rates = {"tokens_per_s": tokens / seconds, "pairs_per_s": pairs / seconds}
        if self._peak is not None:
            flops = self._decoder_flops * tokens + self._head_flops * scored
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

    The usual count: forward and backward take 6 per parameter that multiplies the token (frozen
    ones too, so a LoRA run's share is overstated), attention scores and recomputation left out.
    """
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    config = model.config.get_text_config()
    head = config.vocab_size * config.hidden_size
    tables = head if config.tie_word_embeddings else 2 * head
    return 6.0 * (total - tables), 6.0 * head
