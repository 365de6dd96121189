"""Heads to measure: each turns hidden states, a weight and targets into differentiable logps.

A peer that cannot run is listed with the reason, never dropped. To add one: write a function from
(hidden [N, H], weight [V, H], targets [N]) to logps [N] (and statistics or None), say when it
cannot run (`peers.py`), and append it to `PROVIDERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from widemargin.kernels.linear_logprob.function import linear_logprob

from bench.head import peers
from bench.lib.cases import Case
from bench.lib.exact import Exact
from bench.lib.peaked import PeakedCase

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]

BOUNDS = {
    # Largest relative error (logp, dhidden, dweight) against fp64 with which timing is allowed.
    # Half-precision gradients are rounded once (2e-3); peers may also round logits, and torch's
    # log_softmax sums a row of the vocabulary in plain fp32 (1e-5 at V = 131072).
    "peer": {"float32": (1e-4, 1e-3, 1e-3), "half": (1e-2, 1e-2, 1e-2)},
    # Skips gradients by design, like our tails: timed as long as something of them is left.
    "filtered": {"float32": (1e-4, 5e-2, 5e-2), "half": (1e-2, 5e-2, 5e-2)},
    "exact": {"float32": (1e-5, 1e-4, 1e-4), "half": (1e-4, 1e-2, 1e-2)},
    "mean": {"float32": (1e-5, 1e-2, 5e-3), "half": (1e-4, 1e-2, 5e-3)},
    # Off the peaked case the tail holds more mass, and no bound is promised.
    "mean-hard": {"float32": (1e-5, 5e-2, 5e-2), "half": (1e-4, 5e-2, 5e-2)},
    # Drops gradient by design: it is measured for what that costs and buys.
    "drop": {"float32": (1e-5, 1.0, 1.0), "half": (1e-4, 1.0, 1.0)},
}


@dataclass(frozen=True)
class Provider:
    """A head. `unavailable(case, device)` is None or the reason why it cannot run.

    With a `reference`, forward gives one loss [1] in place of logps, and `reference` says what the
    loss and its gradients are, from the case and the exact answer to it.
    """

    name: str
    forward: Forward
    unavailable: Callable[[Case, str], str | None]
    bound: str = "peer"
    reference: Callable[[PeakedCase, Exact], Exact] | None = None

    def bounds(self, case: Case) -> tuple[float, float, float]:
        kind = self.bound
        if kind == "mean" and not (case.standard and case.distribution == "peaked"):
            kind = "mean-hard"
        return BOUNDS[kind]["float32" if case.dtype == "float32" else "half"]

    def run(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logp [N], dhidden [N, H], dweight [V, H]); the harness times the two halves apart."""
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logp, _ = self.forward(hidden, weight, targets)
        return logp.detach(), *self.backward(logp, hidden, weight, coefficients)

    def backward(
        self, logp: Tensor, hidden: Tensor, weight: Tensor, coefficients: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad = torch.ones_like(logp) if self.reference else coefficients.to(logp.dtype)
        dhidden, dweight = torch.autograd.grad(logp, (hidden, weight), grad)
        return dhidden, dweight


def _always(case: Case, device: str) -> str | None:
    return None


def _full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1), None


def _tma(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    # Imported late, with triton: it is there on Linux only.
    from widemargin.kernels.linear_logprob.tiles import tiles_for

    from bench.head.forwards import tma
    from bench.head.forwards.head import scored_by

    tiles = tma.with_descriptors(tiles_for(hidden.dtype, hidden.device))
    return scored_by(tma.launch, tma.TILE, hidden, weight, targets, tiles)


def _cublas(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    from bench.head.forwards import library
    from bench.head.forwards.head import scored_by

    return scored_by(library.launch, library.TILE, hidden, weight, targets)


def _descriptors_unavailable(case: Case, device: str) -> str | None:
    if reason := _triton_unavailable(case, device):
        return reason
    if torch.cuda.get_device_capability() < (9, 0):
        return "tensor descriptors are worth using from sm_90 on"
    return "descriptors are tuned for half precision" if case.dtype == "float32" else None


def _library_unavailable(case: Case, device: str) -> str | None:
    if case.dtype == "float32":
        return "the library's product is compared in half precision"
    return _triton_unavailable(case, device)


def _triton_unavailable(case: Case, device: str) -> str | None:
    return None if device == "cuda" else "the Triton kernels need a CUDA device"


def _ours(backend: str, tail: str) -> Provider:
    settings: Any = {"backend": backend, "tail": tail, "return_stats": True}
    unavailable = _triton_unavailable if backend == "triton" else _always
    head: Any = partial(linear_logprob, **settings)
    return Provider(f"widemargin-{backend}-{tail}", head, unavailable, bound=tail)


BASELINE = "full-logits"
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(BASELINE, _full_logits, _always),
        *(_ours("torch", tail) for tail in ("exact", "mean", "drop")),
        *(_ours("triton", tail) for tail in ("exact", "mean")),
        Provider(
            "widemargin-triton-mean-tma",
            _tma,
            _descriptors_unavailable,
            bound="mean",
        ),
        Provider(
            "widemargin-triton-mean-cublas",
            _cublas,
            _library_unavailable,
            bound="mean",
        ),
        Provider(
            "torch-linear-cross-entropy",
            peers.torch_linear_cross_entropy,
            peers.torch_linear_cross_entropy_unavailable,
        ),
        Provider("trl-chunked", peers.trl_chunked, peers.trl_unavailable),
        Provider(
            "liger-simpo",
            peers.liger_simpo,
            peers.liger_simpo_unavailable,
            reference=peers.liger_simpo_reference,
        ),
        Provider("liger-ce", peers.liger_linear_cross_entropy, peers.liger_unavailable),
        Provider(
            "liger-ce-mean",
            peers.liger_mean_cross_entropy,
            peers.liger_unavailable,
            reference=peers.mean_cross_entropy_reference,
        ),
        Provider(
            "liger-scaled-ce", peers.liger_scaled_cross_entropy, peers.liger_scaled_unavailable
        ),
        Provider(
            "cut-cross-entropy",
            partial(peers.cut_cross_entropy, filter_eps="high"),
            peers.cut_cross_entropy_unavailable,
            bound="filtered",
        ),
        Provider(
            "cut-cross-entropy-exact",
            partial(peers.cut_cross_entropy, filter_eps=None),
            peers.cut_cross_entropy_unavailable,
        ),
    )
}
