"""Heads to measure: each turns hidden states, a weight and targets into differentiable logps.

A peer that cannot run is listed with the reason, never dropped. To add one: write a function from
(hidden [N, H], weight [V, H], targets [N]) to logps [N] (and statistics or None), say when it
cannot run, and append it to `PROVIDERS`.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]

BOUNDS = {
    # Largest relative error (logp, dhidden, dweight) against fp64 with which timing is allowed.
    # Half-precision gradients are rounded once (2e-3); peers may also round logits, and torch's
    # log_softmax sums a row of the vocabulary in plain fp32 (1e-5 at V = 131072).
    "peer": {"float32": (1e-4, 1e-3, 1e-3), "half": (1e-2, 1e-2, 1e-2)},
    "exact": {"float32": (1e-5, 1e-4, 1e-4), "half": (1e-4, 1e-2, 1e-2)},
    "mean": {"float32": (1e-5, 1e-2, 5e-3), "half": (1e-4, 1e-2, 5e-3)},
    # Off the peaked case the tail holds more mass, and no bound is promised.
    "mean-hard": {"float32": (1e-5, 5e-2, 5e-2), "half": (1e-4, 5e-2, 5e-2)},
    # Drops gradient by design: it is measured for what that costs and buys.
    "drop": {"float32": (1e-5, 1.0, 1.0), "half": (1e-4, 1.0, 1.0)},
}


@dataclass(frozen=True)
class Provider:
    """A head. `unavailable(case, device)` is None or the reason why it cannot run."""

    name: str
    forward: Forward
    unavailable: Callable[[Case, str], str | None]
    bound: str = "peer"

    def bounds(self, case: Case) -> tuple[float, float, float]:
        kind = self.bound
        if kind == "mean" and case.distribution != "peaked":
            kind = "mean-hard"
        return BOUNDS[kind]["float32" if case.dtype == "float32" else "half"]

    def available(self, case: Case, device: str) -> str | None:
        """None, or the reason why it cannot run this case."""
        return self.unavailable(case, device)

    def run(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logp [N], dhidden [N, H], dweight [V, H]); the harness times the two halves apart."""
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logp, _ = self.forward(hidden, weight, targets)
        return logp.detach(), *backward(logp, hidden, weight, coefficients)


def backward(
    logp: Tensor, hidden: Tensor, weight: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    dhidden, dweight = torch.autograd.grad(logp, (hidden, weight), coefficients.to(logp.dtype))
    return dhidden, dweight


def _always(case: Case, device: str) -> str | None:
    return None


def _full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1), None


def _widemargin(
    tail: str, backend: str, hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Any]:
    module = importlib.import_module("widemargin.kernels.linear_logprob")
    return module.linear_logprob(
        hidden, weight, targets, tail=tail, backend=backend, return_stats=True
    )


def _widemargin_unavailable(case: Case, device: str) -> str | None:
    try:
        importlib.import_module("widemargin.kernels.linear_logprob")
    except ImportError as error:
        return f"cannot be imported: {error}"
    return None


def _triton_unavailable(case: Case, device: str) -> str | None:
    if device != "cuda":
        return "the Triton kernels need a CUDA device"
    return _widemargin_unavailable(case, device)


def _torch_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, None]:
    # The default chunk for V >> H is a few tokens, twenty times slower on a CPU (bench/LOG.md).
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
    losses = torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, reduction="none", options=options
    )
    return -losses, None


def _torch_linear_cross_entropy_unavailable(case: Case, device: str) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no nn.LinearCrossEntropyOptions (2.13 has)"
    return None


def _trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    module = importlib.import_module("trl.kernels.chunked_logprob")
    function = module.ChunkedLogProbFunction
    return function.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0], None


def _trl_unavailable(case: Case, device: str) -> str | None:
    if importlib.util.find_spec("trl") is None:
        return "trl is not installed (the bench extra has it)"
    try:
        importlib.import_module("trl.kernels.chunked_logprob")
        importlib.import_module("trl.trainer.utils")
    except Exception as error:  # trl imports much: whatever stops it is the reason to print
        return f"trl cannot be imported: {error}"
    return None


BASELINE = "full-logits"
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(BASELINE, _full_logits, _always),
        *(
            Provider(
                f"widemargin-torch-{tail}",
                partial(_widemargin, tail, "torch"),
                _widemargin_unavailable,
                bound=tail,
            )
            for tail in ("exact", "mean", "drop")
        ),
        *(
            Provider(
                f"widemargin-triton-{tail}",
                partial(_widemargin, tail, "triton"),
                _triton_unavailable,
                bound=tail,
            )
            for tail in ("exact", "mean")
        ),
        Provider(
            "torch-linear-cross-entropy",
            _torch_linear_cross_entropy,
            _torch_linear_cross_entropy_unavailable,
        ),
        Provider("trl-chunked", _trl_chunked, _trl_unavailable),
    )
}
