"""What the head's Triton kernels share: a tile of logits and its statistics.

Sizes that follow from the number of tokens are not specialised on: they differ from batch to batch,
and Triton would compile a kernel again for each that is 1 or a multiple of 16.

Shapes: N tokens, H hidden, V vocabulary, B blocks of 128 vocabulary rows, T tiles of tokens.
"""

# Triton gives constants as constexpr, which type checkers miss.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_mode import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)

PROGRAMS_PER_UNIT = 4
"""Programs per multiprocessor where programs deal the work among themselves."""
FUSED = {"enable_fp_fusion": True}
"""Of every launch: a multiplication and the addition after it are one instruction. Triton's default
up to 3.9; later versions want to be asked."""


@triton.jit
def exp2(x):
    """``2 ** x`` in one instruction; results below 2**-126 are 0."""
    if _INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def softcap_parts(z, softcap):
    """``c * tanh(z / c)`` and its derivative, both exact to rounding where tanh saturates."""
    small = exp2(tl.abs(z) * (-2 * LOG2E / softcap))
    inverse = 1.0 / (1 + small)
    capped = softcap * (1 - small) * inverse
    return tl.where(z < 0, -capped, capped), 4 * small * inverse * inverse


@triton.jit
def logits_tile(
    hidden_ptr, weight_ptr, bias_ptr, offs_n, offs_v, mask_n, mask_v, stride_hn, stride_wv, H,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Logits [ROWS, COLUMNS] in fp32 of tokens ``offs_n`` over rows ``offs_v``, before any scale.

    ROUND: dtype that inputs are rounded to first, as under autocast.
    """
    offs_k = tl.arange(0, DEPTH)
    hidden_ptrs = hidden_ptr + offs_n.to(tl.int64)[:, None] * stride_hn + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_v.to(tl.int64)[None, :] * stride_wv + offs_k[:, None]
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for k in range(0, H, DEPTH):
        mask_k = offs_k < H - k
        a = tl.load(hidden_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        b = tl.load(weight_ptrs, mask=mask_v[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(a.to(ROUND), b.to(ROUND), acc, input_precision="ieee")
        hidden_ptrs += DEPTH
        weight_ptrs += DEPTH
    return add_bias(acc, bias_ptr, offs_v, mask_v, HAS_BIAS, ROUND)


@triton.jit
def described_product(
    hidden_desc, weight_desc, token, row, H,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As `logits_tile`, by tensor descriptors, of tokens and rows from ``token`` and ``row`` on.

    Without the bias; past the end of either operand there are zeros.
    """
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for k in range(0, H, DEPTH):
        a = hidden_desc.load([token, k])
        b = weight_desc.load([row, k])
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


@triton.jit
def add_bias(z, bias_ptr, offs_v, mask_v, HAS_BIAS: tl.constexpr, ROUND: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(ROUND).to(tl.float32)
        z += bias[None, :]
    return z


@triton.jit
def _store_targets(
    z, group, targets_ptr, target_logits_ptr, offs_n, mask_n, V, logit_scale, COLUMNS: tl.constexpr
):
    """Of a tile's logits those of targets, where it holds any."""
    local = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1) - group * COLUMNS
    here = (local >= 0) & (local < tl.minimum(V - group * COLUMNS, COLUMNS))
    local = tl.where(here, local, -1).to(tl.int32)
    if tl.max(local, axis=0) >= 0:
        hit = tl.arange(0, COLUMNS)[None, :] == local[:, None]
        target_logits = tl.sum(tl.where(hit, z, 0.0), axis=1) * logit_scale
        tl.store(target_logits_ptr + offs_n, target_logits, mask=here)


@triton.jit
def _store_profile(
    spread, usable, row, offs_v, offs_b, profile_ptr, counts_ptr, V, B, COLUMNS: tl.constexpr
):
    """Sums over tokens of gradients ``spread`` [ROWS, BLOCKS, WIDTH], and counts of usable ones."""
    columns = tl.reshape(tl.sum(spread, axis=0), [COLUMNS])
    tl.store(profile_ptr + row.to(tl.int64) * V + offs_v, columns, mask=offs_v < V)
    counts = tl.sum(usable.to(tl.float32), axis=0)
    tl.store(counts_ptr + row * B + offs_b, counts, mask=offs_b < B)


@triton.jit
def store_statistics(
    z, tile, group, every, targets_ptr,
    partial_lse_ptr, tops_ptr, target_logits_ptr, profile_ptr, counts_ptr,
    N, V, B, logit_scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, TOPS: tl.constexpr, PROFILE: tl.constexpr,
):  # fmt: skip
    """Of logits ``z`` [ROWS, COLUMNS] before scale and softcap: all that the forward keeps.

    Outputs as in `triton_forward.Statistics`; the profile of one token tile in ``every``.
    logit_scale: above 0. A tile has many elements, so little is done for each.
    """
    BLOCKS: tl.constexpr = COLUMNS // WIDTH
    offs_n = tile * ROWS + tl.arange(0, ROWS)
    offs_v = group * COLUMNS + tl.arange(0, COLUMNS)
    mask_n = offs_n < N
    mask_v = offs_v < V
    if HAS_SOFTCAP:
        z, _ = softcap_parts(z * logit_scale, softcap)
        logit_scale = 1.0
    if group * COLUMNS + COLUMNS > V:
        z = tl.where(mask_v[None, :], z, float("-inf"))

    _store_targets(
        z, group, targets_ptr, target_logits_ptr, offs_n, mask_n, V, logit_scale, COLUMNS
    )
    blocked = tl.reshape(z, [ROWS, BLOCKS, WIDTH])
    top = tl.max(blocked, axis=2)
    if TOPS:  # before `inside` takes as many registers again
        column = tl.arange(0, WIDTH)[None, None, :]
        column = tl.max(tl.where(blocked == top[:, :, None], column, 0), axis=2)
    top = tl.where(top == float("-inf"), 0.0, top)
    step = logit_scale * LOG2E
    inside = exp2(blocked * step - (top * step)[:, :, None])
    sums = tl.sum(inside, axis=2)
    offs_b = group * BLOCKS + tl.arange(0, BLOCKS)
    mask_b = offs_b < B
    places = offs_b.to(tl.int64)[None, :] * N + offs_n[:, None]
    mask = mask_n[:, None] & mask_b[None, :]
    # In the base of `inside`, so that the rounding of top * step cancels.
    tl.store(partial_lse_ptr + places, (top * step + tl.log2(sums)) * (1 / LOG2E), mask=mask)
    share = 1.0 / sums
    if TOPS:
        packed = (share.to(tl.int32, bitcast=True) & -WIDTH) | column
        tl.store(tops_ptr + places, packed, mask=mask)

    if PROFILE:  # noqa: SIM102 (known when compiling, unlike what follows)
        if tile % every == 0:
            usable = (sums > 0) & (sums < float("inf")) & mask_n[:, None]
            if tl.max(tl.max((~usable & mask).to(tl.int32), axis=1), axis=0) > 0:
                inside = tl.where(usable[:, :, None], inside, 0.0)
            spread = inside * tl.where(usable, share, 0.0)[:, :, None]
            if HAS_SOFTCAP:
                tanh = blocked / softcap
                spread *= 1 - tanh * tanh
                spread = tl.where(usable[:, :, None], spread, 0.0)
            row = tile // every
            _store_profile(
                spread, usable, row, offs_v, offs_b, profile_ptr, counts_ptr, V, B, COLUMNS
            )


@triton.jit
def store_block_sums(
    z, tile, group, block_sums_ptr, N, V, B, logit_scale, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEANS: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    """Of logits ``z`` as in `store_statistics` the sums [K, B, N] that are asked for.

    They are those of `extras.KEPT`, in its order.
    """
    BLOCKS: tl.constexpr = COLUMNS // WIDTH
    offs_n = tile * ROWS + tl.arange(0, ROWS)
    offs_b = group * BLOCKS + tl.arange(0, BLOCKS)
    mask_v = group * COLUMNS + tl.arange(0, COLUMNS) < V
    mask = (offs_n < N)[:, None] & (offs_b < B)[None, :]
    places = block_sums_ptr + offs_b.to(tl.int64)[None, :] * N + offs_n[:, None]
    z *= logit_scale
    if HAS_SOFTCAP:
        z, _ = softcap_parts(z, softcap)
    if MEANS:
        whole = tl.sum(tl.reshape(tl.where(mask_v[None, :], z, 0.0), [ROWS, BLOCKS, WIDTH]), axis=2)
    blocks = tl.reshape(tl.where(mask_v[None, :], z, float("-inf")), [ROWS, BLOCKS, WIDTH])
    largest = tl.max(blocks, axis=2)
    below = blocks - tl.where(largest == float("-inf"), 0.0, largest)[:, :, None]
    inside = tl.exp(below)
    sums = tl.sum(inside, axis=2)
    if ENTROPY:
        spread = tl.sum(inside * tl.where(inside > 0, below, 0.0), axis=2)
        tl.store(places, tl.where(sums == 0, 0.0, tl.log(sums) - spread / sums), mask=mask)
        places += B.to(tl.int64) * N
    if SQUARES:
        squares = tl.sum(inside * inside, axis=2) / (sums * sums)
        tl.store(places, tl.where(sums == 0, 1.0, squares), mask=mask)
        places += B.to(tl.int64) * N
    if MEANS:
        tl.store(places, whole, mask=mask)
        places += B.to(tl.int64) * N
    if TOP1:
        column = tl.arange(0, WIDTH)[None, None, :]
        first = tl.min(tl.where(blocks == largest[:, :, None], column, WIDTH - 1), axis=2)
        tl.store(places, largest, mask=mask)
        tl.store(places + B.to(tl.int64) * N, first.to(tl.float32), mask=mask)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[
        dtype
    ]


def descriptors(
    dtype: torch.dtype, *operands: tuple[Tensor, list[int]]
) -> tuple[TensorDescriptor | None, ...]:
    """Tensor descriptors of (matrix, block shape) each; none at all where one cannot be made.

    They want rows of 16 bytes or a multiple, and load without rounding to another dtype. They are
    made on the host: those made on the device need an allocator that worker threads do not have.
    """
    possible = all(
        x.dtype == dtype
        and x.stride(1) == 1
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x, _ in operands
    )
    if not possible:
        return (None,) * len(operands)
    return tuple(TensorDescriptor.from_tensor(x, block) for x, block in operands)


def inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache
def programs(device: torch.device) -> int:
    """How many programs deal the work of a launch among themselves."""
    if device.type != "cuda":
        return 2 * PROGRAMS_PER_UNIT
    return PROGRAMS_PER_UNIT * torch.cuda.get_device_properties(device).multi_processor_count
