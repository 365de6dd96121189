"""What `linear_logprob` takes: checks, the dtype of its products, the choice of backend."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Tail = Literal["exact", "mean", "drop"]
Backend = Literal["auto", "triton", "torch"]
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
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def validate(hidden, weight, targets, bias, softcap, tail, tail_eps, compute_dtype) -> None:
    def expect(fine: bool, name: str, expected: str, got: object) -> None:
        if not fine:
            raise ValueError(f"{name}: expected {expected}, got {got}")

    expect(hidden.dim() == 2, "hidden", "[N, H]; flatten batch and sequence", list(hidden.shape))
    width = hidden.shape[1]
    expect(
        weight.dim() == 2 and weight.shape[1] == width,
        "weight",
        f"[V, {width}]",
        list(weight.shape),
    )
    expect(
        len(weight) > 0,
        "weight",
        "at least one vocabulary row (under ZeRO-3 or FSDP, call "
        "inside the lm_head module's forward, where it is gathered)",
        list(weight.shape),
    )
    expect(targets.shape == hidden.shape[:1], "targets", f"[{len(hidden)}]", list(targets.shape))
    expect(targets.dtype == torch.int64, "targets", "int64 token ids", targets.dtype)
    expect(hidden.dtype in DTYPES, "hidden", "fp32, bf16, fp16 or fp64", hidden.dtype)
    autocast = compute_dtype != hidden.dtype or compute_dtype != weight.dtype
    expect(weight.dtype in DTYPES, "weight", "fp32, bf16, fp16 or fp64", weight.dtype)
    fits = weight.dtype == hidden.dtype or (
        autocast and torch.is_autocast_enabled(hidden.device.type)
    )
    expect(
        fits,
        "weight",
        f"hidden's dtype {hidden.dtype}; cast one of them or use autocast",
        weight.dtype,
    )
    if bias is not None:
        expect(bias.shape == weight.shape[:1], "bias", f"[{len(weight)}]", list(bias.shape))
    devices = {x.device for x in (hidden, weight, targets, bias) if x is not None}
    expect(len(devices) == 1, "devices", "all inputs on one device", sorted(map(str, devices)))
    expect(softcap is None or softcap > 0, "softcap", "a positive number or None", softcap)
    expect(tail in ("exact", "mean", "drop"), "tail", "'exact', 'mean' or 'drop'", repr(tail))
    expect(0 < tail_eps < 1, "tail_eps", "a probability in (0, 1)", tail_eps)
