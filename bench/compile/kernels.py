"""Every Triton kernel in the configurations that are launched, ready to compile without a GPU.

A kernel joins with a function that returns the arguments of `compile_resources`, importing what it
needs inside, and one entry in `KERNELS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.compile.triton_compile import Attributes, aligned

if TYPE_CHECKING:
    from widemargin.kernels.linear_logprob.tiles import Tile


class Source(NamedTuple):
    """What `compile_resources` takes, but for the architecture."""

    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Attributes
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One kernel in one configuration."""

    name: str
    source: Callable[[], Source]
    archs: tuple[int, ...] = (80, 90)
    needs_tensor_cores: bool = True


def _margin(kernel: str, dtype: str) -> Callable[[], Source]:
    def source() -> Source:
        from widemargin.kernels.margin_loss import triton_kernels

        fn = getattr(triton_kernels, kernel)
        types = {
            "logps_ptr": f"*{dtype}",
            "d_logps_ptr": f"*{dtype}",
            "cu_seqlens_ptr": "*i32",
            "margins_ptr": "*fp32",
            "losses_ptr": "*fp32",
            "slopes_ptr": "*fp32",
            "sums_ptr": "*fp32",
            "grad_ptr": "*fp32",
            "beta": "fp32",
            "label_smoothing": "fp32",
            "stride_grad": "i32",
            "tokens": "i32",
            "sequences": "i32",
            "pairs": "i32",
        }
        constants = {"HINGE": False, "SMOOTH": True, "BLOCK": triton_kernels.BLOCK}
        signature = {name: types[name] for name in fn.arg_names if name in types}
        return Source(
            fn,
            signature,
            {name: constants[name] for name in fn.arg_names if name in constants},
            aligned(*(name for name in signature if name.endswith("_ptr"))),
            {},
        )

    return source


class HeadKernel(NamedTuple):
    """Where a kernel of the head lives, and whose tile it takes.

    field: of `Tiles`; with "" the kernel's module has its ``TILE``, with None it has none.
    """

    module: str
    field: str | None
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    archs: tuple[int, ...] = (80, 90)
    variants: tuple[str, ...] = ()  # of `VARIANTS`, in half precision
    product: bool = True


_HEAD = "widemargin.kernels.linear_logprob"
HEAD = {
    "_forward_kernel": HeadKernel(
        f"{_HEAD}.triton_forward", "forward", variants=("softcap", "sampled", "extras")
    ),
    "_forward_tma_kernel": HeadKernel(
        "bench.head.forwards.tma", "", ("bf16",), (90,), ("sampled",)
    ),
    "_statistics_kernel": HeadKernel("bench.head.forwards.library", "", product=False),
    "_recompute_kernel": HeadKernel(
        f"{_HEAD}.triton_cells", "recompute", variants=("softcap", "entropy", "descriptors")
    ),
    "_weight_kernel": HeadKernel(f"{_HEAD}.triton_cells", "d_weight", variants=("descriptors",)),
    "_hidden_kernel": HeadKernel(f"{_HEAD}.triton_cells", "d_hidden", variants=("descriptors",)),
    "_bias_kernel": HeadKernel(f"{_HEAD}.triton_cells", None, product=False),
    "_count_kernel": HeadKernel(f"{_HEAD}.triton_routing", None, ("bf16",), product=False),
    "_flag_kernel": HeadKernel(f"{_HEAD}.triton_routing", None, ("bf16",), product=False),
    "_entries_kernel": HeadKernel(f"{_HEAD}.triton_routing", None, ("bf16",), product=False),
    "_profile_kernel": HeadKernel(f"{_HEAD}.triton_routing", None, product=False),
    "_finish_kernel": HeadKernel(f"{_HEAD}.triton_cells", None, product=False),
}


_ASKED = ("ENTROPY", "SQUARES", "MEANS", "TOP1")
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "softcap": {"HAS_SOFTCAP": True},
    "sampled": {"every": 1},
    "extras": dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", *_ASKED), True),
    "entropy": {"HAS_SOFTCAP": True, "ENTROPY": True},
    "descriptors": {},
}
"""Constants of a kernel's variants. The forward's "sampled" adds every token tile to the profile,
so `outside_main_loop` counts a tile that does; without it, one that does not. "extras" is the
forward asked for all of `Extras`, "entropy" the backward of its gradient. "descriptors" has its
operands by tensor descriptors, on sm_90."""


def _descriptors(kernel: str, tile: Tile) -> list[tuple[str, int, int]]:
    """Name and block shape of the descriptors that a kernel of the head gets with ``tile``."""
    if kernel != "_forward_tma_kernel" and not tile.descriptors:
        return []
    rows, columns, depth = tile.rows, tile.columns, tile.depth
    return {
        "_weight_kernel": [("hidden_desc", depth, columns), ("work_desc", depth, rows)],
        "_hidden_kernel": [("weight_desc", depth, columns), ("work_desc", rows, depth)],
    }.get(kernel, [("hidden_desc", rows, depth), ("weight_desc", columns, depth)])


def head_source(kernel: str, dtype: str, tile: Tile, variant: str = "") -> Source:
    """A kernel of the head as it is launched with ``tile``; ``variant`` is of `VARIANTS`."""
    import triton.language as tl
    from widemargin.kernels.linear_logprob.cells import ENOUGH, LEVELS
    from widemargin.kernels.linear_logprob.routing import BLOCK, TOP_CUT
    from widemargin.kernels.linear_logprob.triton_backward import FINISH_STEP, STEP
    from widemargin.kernels.linear_logprob.triton_routing import GROUP

    fn = getattr(importlib.import_module(HEAD[kernel].module), kernel)
    inputs = ("hidden_ptr", "weight_ptr", "bias_ptr", "work_ptr", "d_weight_ptr", "means_ptr")
    inputs += ("weighted_ptr", "out_ptr")
    longs = ("targets_ptr", "cells_ptr", "by_tile_ptr", "slices_ptr", "order_ptr")
    longs += ("slice_blocks_ptr", "by_count_ptr", "block_bounds_ptr", "tile_bounds_ptr")
    longs += ("tile_blocks_ptr",)
    whole = ("tops_ptr", "levels_ptr", "per_cell_ptr", "per_token_ptr", "cell_starts_ptr")
    whole += ("token_starts_ptr", "places_ptr", "rows_ptr", "entry_bounds_ptr", "token_bounds_ptr")
    types = dict.fromkeys(inputs, f"*{dtype}") | dict.fromkeys(longs, "*i64")
    types |= dict.fromkeys(whole, "*i32") | dict.fromkeys(("flags_ptr", "marks_ptr"), "*i8")
    types |= {"logit_scale": "fp32", "softcap": "fp32", "counts_ptr": "*fp32"}
    if kernel == "_count_kernel":
        types["counts_ptr"] = "*i32"
    described = {
        name: f"tensordesc<{dtype}[{rows}, {columns}]>"
        for name, rows, columns in _descriptors(kernel, tile)
    }
    types |= described
    constants = {
        **{name: None for name in fn.arg_names if name.endswith("_desc") and name not in described},
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "TOGETHER": tile.together,
        "WIDTH": BLOCK,
        "TILE": BLOCK,
        "BLOCK": BLOCK,
        "GROUP": GROUP,
        "ENOUGH": ENOUGH,
        "TOP_CUT": TOP_CUT,
        "LEVELS": LEVELS,
        "STEP": FINISH_STEP if kernel == "_finish_kernel" else STEP,
        **dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", *_ASKED), False),
        "TOPS": True,
        "PROFILE": True,
        "TAIL": True,
        "WEIGHTED": True,
        "ROUND": tl.float32 if dtype == "fp32" else tl.bfloat16,
    } | VARIANTS[variant]
    arguments = [name for name in fn.arg_names if name not in constants]
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in arguments
    }
    # As at a launch: pointers, and sizes of real models, are multiples of 16.
    multiples = {"stride_hn", "stride_wv", "stride_ln", "stride_on", "H", "V"}
    return Source(
        fn,
        signature,
        {name: constants[name] for name in fn.arg_names if name in constants},
        aligned(*(name for name in arguments if name.endswith("_ptr") or name in multiples)),
        {"num_warps": tile.warps, "num_stages": tile.stages},
    )


def _head(kernel: str, dtype: str, arch: int, variant: str) -> Callable[[], Source]:
    """A kernel of the head with the tile that `tiles.py`, or its own module, gives it."""

    def source() -> Source:
        from widemargin.kernels.linear_logprob import tiles
        from widemargin.kernels.linear_logprob.routing import BLOCK
        from widemargin.kernels.linear_logprob.triton_backward import (
            FINISH_COLUMNS,
            tile_of_long_epilogue,
        )

        field = HEAD[kernel].field
        if field is None:
            width = FINISH_COLUMNS if kernel == "_finish_kernel" else BLOCK
            warps = 8 if kernel == "_bias_kernel" else 4
            return head_source(kernel, dtype, tiles.Tile(BLOCK, width, 0, warps, 3))
        if field:
            tile = getattr(tiles.FULL if dtype == "fp32" else tiles.HALF[arch], field)
        else:
            tile = importlib.import_module(HEAD[kernel].module).TILE
        if kernel == "_forward_kernel" and variant == "softcap":
            tile = tile._replace(columns=BLOCK)
        if kernel == "_recompute_kernel" and variant in ("softcap", "entropy"):
            tile = tile_of_long_epilogue(tile)
        if variant == "descriptors":
            tile = tile._replace(descriptors=True)
        if variant == "extras":
            tile = importlib.import_module(HEAD[kernel].module).tile_of_extras(tile)
        return head_source(kernel, dtype, tile, variant)

    return source


KERNELS: list[Kernel] = [
    Kernel(f"margin{kernel} {dtype}", _margin(kernel, dtype), needs_tensor_cores=False)
    for kernel in ("_loss_kernel", "_loss_backward_kernel", "_sums_kernel", "_sums_backward_kernel")
    for dtype in ("fp32", "bf16")
]


KERNELS += [
    Kernel(
        f"head{name.removesuffix('_kernel').replace('_', ' ')} {dtype}"
        + (f" {variant}" if variant else ""),
        _head(name, dtype, arch, variant),
        archs=(arch,),
        needs_tensor_cores=kernel.product and dtype != "fp32",
    )
    for name, kernel in HEAD.items()
    for dtype in kernel.dtypes
    # In fp32, which no tensor core serves, the softcap spills a few bytes in every tile tried.
    for variant in ("", *(kernel.variants if dtype == "bf16" else ()))
    for arch in kernel.archs
    # "sampled" is of no launch: it is there for its count on sm_90.
    if arch == 90 or variant not in ("sampled", "descriptors")
]
