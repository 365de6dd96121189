"""What the public functions share: checks of their arguments, and the choice of a backend.

`refuse_transforms` is for operators, which have a rule for ordinary backward alone.

A ``ValueError`` names the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._C._functorch import (  # pyright: ignore[reportMissingModuleSource]
    is_gradtrackingtensor,
)
from torch.autograd import forward_ad

Backend = Literal["auto", "triton", "torch"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Triton is a dependency on Linux only, and nothing imports it before a kernel is to run.
_HAS_TRITON = find_spec("triton") is not None


def expect(fine: bool, name: str, expected: str | Callable[[], str], got: object) -> None:
    """Raise ``ValueError`` unless fine.

    A text with a size in it is a function: formatted, a size becomes a constant of the graph that
    ``torch.compile`` makes, which then makes one graph for every size. ``got`` is formatted here
    for the same reason; of a type the name is shown.
    """
    if not fine:
        text = expected if isinstance(expected, str) else expected()
        shown = got.__name__ if isinstance(got, type) else repr(got)
        raise ValueError(f"{name}: expected {text}, got {shown}")


def check_tensors(**arguments: object) -> None:
    """Raise ``ValueError`` for the first that is not a tensor."""
    for name, value in arguments.items():
        expect(isinstance(value, Tensor), name, "a tensor", type(value))


def is_number(value: Any) -> bool:
    """Whether it is a finite number of Python's (or ``torch.compile``'s stand-in for one)."""
    numbers = (int, float, torch.SymInt, torch.SymFloat)
    return isinstance(value, numbers) and -math.inf < value < math.inf


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Raise for function ``name`` in torch.func's transforms that differentiate.

    In forward mode torch would pass over tangents and return derivatives of zero.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name}: it has no derivative in forward mode (jvp); use reverse mode, or the "
                "definition in kernels.reference"
            )
        if not torch.compiler.is_compiling() and is_gradtrackingtensor(tensor):
            raise NotImplementedError(
                f"{name}: use backward or torch.autograd.grad, not torch.func's grad, vjp "
                "and jacrev, or the definition in kernels.reference, which takes them"
            )


def choose_backend(backend: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """ "triton" or "torch", for inputs where ``tensor`` is, in ``dtype``.

    An explicit "triton" on inputs that its kernels do not take raises ``ValueError``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        fits = _HAS_TRITON and tensor.is_cuda and dtype in TRITON_DTYPES
        return "triton" if fits else "torch"
    if backend == "torch":
        return "torch"
    if not _HAS_TRITON:
        raise ValueError("backend: 'triton' needs the package triton; install it or use 'auto'")
    from .triton_mode import INTERPRETED

    if dtype not in TRITON_DTYPES:
        raise ValueError(f"backend: 'triton' takes fp32, bf16 or fp16, got {dtype}; use 'auto'")
    if not tensor.is_cuda and not (INTERPRETED and tensor.device.type == "cpu"):
        raise ValueError(
            f"backend: 'triton' takes CUDA tensors, got {tensor.device} (a CPU only in Triton's "
            "interpreter, TRITON_INTERPRET=1 set before triton is imported); use 'auto'"
        )
    return "triton"
