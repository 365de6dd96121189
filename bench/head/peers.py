"""Published heads to compare with, each behind the interface of `providers.py`.

Versions these were written against stand in constraints.txt; `make wheels` gathers them for a
machine without network. Two kinds:
- per token: (hidden [N, H], weight [V, H], targets [N]) to logps [N], then any coefficients;
- whole loss: the same inputs to one loss, whose gradient forward already computes. What such a head
  is compared with is in `*_reference`: the loss in fp64, and each token's coefficient in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import replace

import torch
from torch import Tensor

from bench.lib.cases import Case
from bench.lib.exact import Exact, exact
from bench.lib.peaked import PeakedCase

SIMPO = {"beta": 2.5, "gamma": 1.4}
SEQUENCE = 512
"""Tokens of each of Liger SimPO's sequences; it takes a padded rectangle of them."""


def missing(module: str, package: str) -> str | None:
    """The reason why ``module`` cannot be imported, or None."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{package} is not installed (`make wheels`, or the bench extra)"
    try:
        importlib.import_module(module)
    except Exception as error:  # peers import much: whatever stops one is the reason to print
        return f"{package} cannot be imported: {type(error).__name__}: {error}"[:300]
    return None


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor):
    # The default chunk for V >> H is a few tokens, twenty times slower on a CPU (bench/LOG.md).
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=1024 if hidden.is_cuda else 256)
    losses = torch.nn.functional.linear_cross_entropy(
        hidden, weight, targets, reduction="none", options=options
    )
    return -losses, None


def torch_linear_cross_entropy_unavailable(case: Case, device: str) -> str | None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no nn.LinearCrossEntropyOptions (2.13 has)"
    return None


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor):
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    return function.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0], None


def trl_unavailable(case: Case, device: str) -> str | None:
    # Its backward imports the second one.
    return missing("trl.kernels.chunked_logprob", "trl") or missing("trl.trainer.utils", "trl")


def liger_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor):
    """A loss per token: Liger then puts the gradient off to backward and recomputes the logits."""
    return -_liger_loss(hidden, weight, targets, "none"), None


def liger_mean_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor):
    """The mean cross-entropy, three passes: no preference loss, but what Liger is fastest at."""
    return _liger_loss(hidden, weight, targets, "mean").view(1), None


def _liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearCrossEntropyFunction
    return function.apply(
        hidden, weight, targets, None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32
    )[0]


def mean_cross_entropy_reference(case: PeakedCase, answer: Exact) -> Exact:
    each = torch.full_like(answer.logp, -1 / len(answer.logp))
    of_mean = exact(replace(case, coefficients=each))
    return replace(of_mean, logp=-of_mean.logp.mean().view(1))


def liger_unavailable(case: Case, device: str) -> str | None:
    if device != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return "Liger's cross-entropy kernels need a CUDA device"
    return missing("liger_kernel.ops", "liger-kernel")


def liger_simpo(hidden: Tensor, weight: Tensor, targets: Tensor):
    module = importlib.import_module("liger_kernel.chunked_loss")
    # Compiled, it is up to a seventh faster on a CPU, starts 15 s later in every process that times
    # or measures it, and its memory cannot be told.
    head = module.LigerFusedLinearSimPOLoss(
        **SIMPO, alpha=0.0, compute_nll_loss=False, compiled=hidden.is_cuda
    )
    sequences = 2 * _pairs(len(hidden))
    inputs = hidden.view(sequences, -1, hidden.shape[1])
    return head(weight, inputs, targets.view(sequences, -1))[0].view(1), None


def liger_simpo_reference(case: PeakedCase, answer: Exact) -> Exact:
    logp = answer.logp.detach().clone().requires_grad_()
    chosen, rejected = logp.view(2 * _pairs(len(logp)), -1).mean(1).chunk(2)
    gap = SIMPO["beta"] * (chosen - rejected) - SIMPO["gamma"]
    loss = -torch.nn.functional.logsigmoid(gap).mean()
    (each,) = torch.autograd.grad(loss, logp)
    return replace(exact(replace(case, coefficients=each)), logp=loss.detach().view(1))


def _pairs(tokens: int) -> int:
    return max(1, tokens // (2 * SEQUENCE))


def liger_simpo_unavailable(case: Case, device: str) -> str | None:
    if case.tokens % (2 * _pairs(case.tokens)):
        return f"{case.tokens} tokens do not make pairs of sequences of one length"
    return missing("liger_kernel.chunked_loss", "liger-kernel")


def liger_scaled_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor):
    """Liger's CuTe kernel on Hopper, chunks of 512 tokens in torch elsewhere."""
    # Its check of the targets waits for the device.
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    return -module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets), None


def liger_scaled_unavailable(case: Case, device: str) -> str | None:
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        if case.dtype != "bfloat16":
            return "Liger's CuTe kernel takes bf16 only"
        if reason := missing("cutlass", "nvidia-cutlass-dsl"):
            return reason
    return missing("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")


def cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, filter_eps: str | None):
    module = importlib.import_module("cut_cross_entropy")
    losses = module.linear_cross_entropy(
        hidden, weight, targets, reduction="none", filter_eps=filter_eps
    )
    return -losses, None


def cut_cross_entropy_unavailable(case: Case, device: str) -> str | None:
    if device != "cuda":
        return "Cut Cross-Entropy needs a CUDA device"
    if case.dtype == "float32":
        return "Cut Cross-Entropy's backward takes bf16 and fp16 only"
    return missing("cut_cross_entropy", "cut-cross-entropy")
