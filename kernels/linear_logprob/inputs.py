"""What `linear_logprob` takes: checks, the dtype of its products, the choice of backend."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import expect, is_number
from ..reference import IGNORE_INDEX

Tail = Literal["exact", "mean", "drop"]
Backend = Literal["auto", "triton", "torch"]
TAIL_EPS = 2**-12
"""The default: the largest power of two with which the loss of whole trainings, averaged over ten
steps, keeps within 1% of what the exact gradient gives (docs/studies.md)."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def choose_backend(backend: Backend, hidden: Tensor, compute_dtype: torch.dtype) -> str:
    """ "triton" or "torch"; an explicit "triton" on inputs it cannot take raises ValueError."""
    if backend == "torch":
        return "torch"
    if backend == "auto":
        fits = _HAS_TRITON and hidden.is_cuda and compute_dtype != torch.float64
        return "triton" if fits else "torch"
    if backend != "triton":
        raise ValueError(f"backend: expected 'auto', 'triton' or 'torch', got {backend!r}")
    if not _HAS_TRITON:
        raise ValueError("backend: 'triton' needs the package triton; install it or use 'auto'")
    from .triton_tile import INTERPRETED

    if compute_dtype == torch.float64:
        raise ValueError("backend: 'triton' takes fp32, bf16 or fp16, got fp64; use 'auto'")
    if not hidden.is_cuda and not (INTERPRETED and hidden.device.type == "cpu"):
        raise ValueError(
            f"backend: 'triton' takes CUDA tensors, got {hidden.device} (a CPU only in Triton's "
            "interpreter, TRITON_INTERPRET=1 set before triton is imported); use 'auto'"
        )
    return "triton"


def compute_dtype_of(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype inputs are rounded to before products: autocast's, or their own."""
    if _autocast(hidden) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _autocast(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise where torch would pass over tangents and return derivatives of zero."""
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "linear_logprob: it has no derivative in forward mode (jvp); use reverse mode, or "
                "linear_logprob of kernels.reference"
            )


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raise ``ValueError`` for ids outside the vocabulary, on a CPU: a GPU would be waited for."""
    if targets.device.type != "cpu" or not len(targets):
        return
    outside = ((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= vocabulary)
    if bool(outside.any()):
        wrong = int(targets[outside][0])
        expect(False, "targets", f"ids in [0, {vocabulary}) or {IGNORE_INDEX}", wrong)


def validate(hidden, weight, targets, bias, logit_scale, softcap, tail, tail_eps) -> None:
    """Raise ``ValueError`` for the first argument of `linear_logprob` that does not fit."""
    expect(hidden.dim() == 2, "hidden", "[N, H]; flatten batch and sequence", list(hidden.shape))
    width = hidden.shape[1]
    fits = weight.dim() == 2 and weight.shape[1] == width
    expect(fits, "weight", f"[V, {width}]", list(weight.shape))
    gathered = (
        "at least one vocabulary row (under ZeRO-3 or FSDP, call inside the lm_head module's "
        "forward, where it is gathered)"
    )
    expect(len(weight) > 0, "weight", gathered, list(weight.shape))
    expect(targets.shape == hidden.shape[:1], "targets", f"[{len(hidden)}]", list(targets.shape))
    expect(targets.dtype == torch.int64, "targets", "int64 token ids", targets.dtype)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        expect(tensor.dtype in DTYPES, name, "fp32, bf16, fp16 or fp64", tensor.dtype)
    same = f"hidden's dtype {hidden.dtype}; cast one of them or use autocast"
    expect(weight.dtype == hidden.dtype or _autocast(hidden), "weight", same, weight.dtype)
    if bias is not None:
        expect(bias.shape == weight.shape[:1], "bias", f"[{len(weight)}]", list(bias.shape))
        expect(bias.is_floating_point(), "bias", "a floating tensor", bias.dtype)
    devices = {x.device for x in (hidden, weight, targets, bias) if x is not None}
    expect(len(devices) == 1, "devices", "all inputs on one device", sorted(map(str, devices)))
    scale = "a finite number (to learn one, multiply hidden by it)"
    expect(is_number(logit_scale), "logit_scale", scale, logit_scale)
    positive = softcap is None or (is_number(softcap) and softcap > 0)
    expect(positive, "softcap", "a positive number or None", repr(softcap))
    expect(tail in ("exact", "mean", "drop"), "tail", "'exact', 'mean' or 'drop'", repr(tail))
    fits = is_number(tail_eps) and 0 < tail_eps < 1
    expect(fits, "tail_eps", "a probability in (0, 1)", repr(tail_eps))
