"""bf16 in Triton's interpreter as a GPU has it.

The interpreter multiplies the bits of bf16 numbers as integers, and truncates where a GPU rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from widemargin.kernels.linear_logprob import tiles, triton_backward, triton_forward


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16's bits [...] uint16 as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """fp32 [...] to bf16's bits, to the nearest and to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def take_half_precision(patch: pytest.MonkeyPatch) -> None:
    """Let the head's Triton kernels run in bf16 and fp16 on a CPU for one test."""
    builder: Any = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, d, *rest):
        a, b = (
            interpreter.TensorHandle(widened(x.data), tl.float32) if is_bf16(x.dtype) else x
            for x in (a, b)
        )
        if a.dtype.scalar == tl.float16:  # numpy would sum in half precision
            a, b = (interpreter.TensorHandle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *rest)

    def cast_impl(self, source, to, *rest):
        if source.dtype.scalar == tl.float32 and is_bf16(to):
            return interpreter.TensorHandle(rounded(source.data), tl.bfloat16)
        if is_bf16(source.dtype) and to.scalar == tl.float32:
            return interpreter.TensorHandle(widened(source.data), tl.float32)
        return cast(self, source, to, *rest)

    patch.setattr(builder, "create_dot", create_dot)
    patch.setattr(builder, "cast_impl", cast_impl)
    patch.setattr(builder, "create_fp_trunc", cast_impl)
    patch.setattr(builder, "create_fp_ext", cast_impl)
    patch.setattr(builder, "create_fp_to_fp", cast_impl)
    for module in (triton_forward, triton_backward):
        patch.setattr(module, "tiles_for", lambda *_: tiles.FULL)
    patch.setattr(triton_backward, "_fp32_product", lambda a, b: torch.mm(a.float(), b.float()))


def is_bf16(dtype: Any) -> bool:
    return dtype.scalar == tl.bfloat16
