"""Stand-ins for the packages whose kernels recurrent layers call on a GPU.

They have those packages' names and signatures, refuse what the packages refuse, and compute each
sequence by transformers' own torch function: so a test sees what arrives, and numbers to compare.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

Torch = Callable[..., Any]
Seen = list[tuple[str, list[int]]]
"""Of each call, the kernel's name and the tokens of its sequences."""


def _pieces(counts: list[int], axis: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(counts, axis) for tensor in tensors), strict=True))


def _counts_of_numbers(seq_idx: Tensor | None, rows: int, length: int) -> list[int]:
    """Of ``seq_idx``, as mamba-ssm and causal-conv1d read it: one number a sequence, from 0."""
    assert seq_idx is not None
    assert seq_idx.dtype == torch.int32
    assert seq_idx.is_contiguous()
    assert seq_idx.shape == (rows, length) == (1, length)
    numbers, counts = seq_idx[0].unique_consecutive(return_counts=True)
    assert numbers.tolist() == list(range(len(counts)))
    return counts.tolist()


def _convolution(torch_function: Torch, seen: Seen) -> Torch:
    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Any = None,
        seq_idx: Any = None,
        initial_states: Any = None,
        return_final_states: bool = False,
        final_states_out: Any = None,
        activation: Any = None,
    ) -> Tensor:
        counts = _counts_of_numbers(seq_idx, x.shape[0], x.shape[2])
        assert initial_states is final_states_out is None
        assert not return_final_states
        assert x.stride(1) == 1, "seq_idx is only supported for channel last layout"
        assert x.stride(0) % 8 == x.stride(2) % 8 == 0, "strides have to be multiples of 8"
        seen.append(("causal_conv1d_fn", counts))
        parts = _pieces(counts, 2, x)
        return torch.cat([torch_function(part, weight, bias, activation) for (part,) in parts], 2)

    return causal_conv1d_fn


def _chunk_scan(torch_function: Torch, seen: Seen) -> Torch:
    def mamba_chunk_scan_combined(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Any = None,
        z: Any = None,
        dt_bias: Any = None,
        initial_states: Any = None,
        seq_idx: Any = None,
        cu_seqlens: Any = None,
        dt_softplus: bool = False,
        dt_limit: Any = (0.0, float("inf")),
        return_final_states: bool = False,
        return_varlen_states: bool = False,
    ) -> Tensor:
        counts = _counts_of_numbers(seq_idx, x.shape[0], x.shape[1])
        assert z is initial_states is cu_seqlens is None
        assert not return_final_states
        assert not return_varlen_states
        seen.append(("mamba_chunk_scan_combined", counts))
        same = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        parts = _pieces(counts, 1, x, dt, B, C)
        return torch.cat(
            [torch_function(px, pdt, A, pb, pc, chunk_size, **same) for px, pdt, pb, pc in parts], 1
        )

    return mamba_chunk_scan_combined


def _delta_rule(name: str) -> Callable[[Torch, Seen], Torch]:
    def made(torch_function: Torch, seen: Seen) -> Torch:
        def kernel(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor,
            beta: Tensor,
            scale: Any = None,
            initial_state: Any = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            cu_seqlens: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            assert q.shape[0] == 1, "the batch size is expected to be 1 when using cu_seqlens"
            assert cu_seqlens.dtype == torch.int64
            assert scale is initial_state is None
            assert not output_final_state
            assert (cu_seqlens[0], cu_seqlens[-1]) == (0, q.shape[1])
            counts = cu_seqlens.diff().tolist()
            seen.append((name, counts))
            normed = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
            parts = [
                torch_function(pq, pk, pv, g=pg, beta=pb, **normed)[0]
                for pq, pk, pv, pg, pb in _pieces(counts, 1, q, k, v, g, beta)
            ]
            return torch.cat(parts, 1), None

        kernel.__name__ = name
        return kernel

    return made


def _selective_scan(torch_function: Torch, seen: Seen) -> Torch:
    def selective_scan_fn(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Any = None,
        z: Any = None,
        delta_bias: Any = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Any:
        raise AssertionError("it keeps no sequences apart, so no packed row may come here")

    return selective_scan_fn


def no_boundaries(torch_function: Torch, seen: Seen) -> Torch:
    """causal-conv1d's as it was before 1.2."""

    def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Any = None, activation: Any = None):
        return torch_function(x, weight, bias, activation)

    return causal_conv1d_fn


KERNELS: dict[str, tuple[str, str, Callable[[Torch, Seen], Torch]]] = {
    "causal_conv1d_fn": ("causal_conv1d", "", _convolution),
    "mamba2_chunk_scan": ("mamba_ssm", "ops.triton.ssd_combined", _chunk_scan),
    "torch_chunk_gated_delta_rule": (
        "fla", "ops.gated_delta_rule", _delta_rule("chunk_gated_delta_rule")
    ),
    "chunk_kimi_delta_attention": ("fla", "ops.kda", _delta_rule("chunk_kda")),
    "mamba_selective_scan": ("mamba_ssm", "ops.selective_scan_interface", _selective_scan),
}  # fmt: skip
"""By the modeling module's function: package, path in it, and what makes the stand-in."""


def install(monkeypatch: Any, modeling: ModuleType, **others: Any) -> Seen:
    """Resolve a modeling module's functions again, as if the packages were installed.

    ``others`` make other stand-ins, by the modeling module's function.
    """
    seen: Seen = []
    for name, (package, path, make) in KERNELS.items():
        function = getattr(modeling, name, None)
        if function is None:
            continue
        torch_function = inspect.unwrap(getattr(function, "by_sequence", function))
        kernel = others.get(name, make)(torch_function, seen)
        kernel.__module__ = f"{package}.{path}".rstrip(".")
        place: Any = SimpleNamespace(**{kernel.__name__: kernel})
        for part in reversed(path.split(".") if path else []):
            place = SimpleNamespace(**{part: place})
        module = ModuleType(package)
        vars(module).update(vars(place))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, module)
            resolved = use_kernel_func_from_hub_with_fallback(kernel.__name__, package)
            monkeypatch.setattr(modeling, name, resolved(torch_function))
    return seen
