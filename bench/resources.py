"""Registers, spills, shared memory and instructions of every kernel, compiled without a GPU.

`python -m bench.resources [NAME ...] [--out FILE]` compiles the kernels of `KERNELS` for each of
their architectures, writes bench/results/resources.json and prints it as a table. With names only
those are compiled, and nothing is written unless `--out` says where.

A kernel joins with a function that returns the arguments of `compile_resources`, importing what it
needs inside, and one entry in `KERNELS`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.triton_compile import Attributes, aligned, compile_resources

RESULTS = Path(__file__).parent / "results" / "resources.json"


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
        from widemargin.kernels import triton_margin

        fn = getattr(triton_margin, kernel)
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
        constants = {"HINGE": False, "SMOOTH": True, "BLOCK": triton_margin.BLOCK}
        signature = {name: types[name] for name in fn.arg_names if name in types}
        return Source(
            fn,
            signature,
            {name: constants[name] for name in fn.arg_names if name in constants},
            aligned(*(name for name in signature if name.endswith("_ptr"))),
            {},
        )

    return source


def _head(kernel: str, dtype: str, arch: int, softcap: bool = False) -> Callable[[], Source]:
    """A kernel of the head with the tile that `tiles.py` gives it."""

    def source() -> Source:
        import triton.language as tl
        from widemargin.kernels import tiles, triton_backward, triton_forward
        from widemargin.kernels.routing import BLOCK

        fn = getattr(triton_forward, kernel, None) or getattr(triton_backward, kernel)
        table = tiles.FULL if dtype == "fp32" else tiles.HALF[arch]
        tile = getattr(table, FIELDS[kernel])
        if kernel == "_forward_kernel" and softcap:
            tile = tile._replace(columns=BLOCK)
        inputs = ("hidden_ptr", "weight_ptr", "bias_ptr", "work_ptr", "d_weight_ptr")
        counts = ("blocks_ptr", "tiles_ptr", "by_tile_ptr", "slices_ptr", "target_bounds_ptr")
        counts += ("block_bounds_ptr", "block_slices_ptr", "tile_bounds_ptr")
        types = dict.fromkeys(inputs, f"*{dtype}") | dict.fromkeys(counts, "*i32")
        types |= {"targets_ptr": "*i64", "by_target_ptr": "*i64"}
        types |= {"logit_scale": "fp32", "softcap": "fp32"}
        constants = {
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEPTH": tile.depth,
            "WIDTH": BLOCK,
            "TILE": BLOCK,
            "BLOCK": BLOCK,
            "HAS_BIAS": False,
            "HAS_SOFTCAP": softcap,
            "PROFILE": True,
            "TAIL": True,
            "D_BIAS": False,
            "ROUND": tl.float32 if dtype == "fp32" else tl.bfloat16,
        }
        arguments = [name for name in fn.arg_names if name not in constants]
        signature = {
            name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in arguments
        }
        # As at a launch: pointers, and sizes of real models, are multiples of 16.
        multiples = {"stride_hn", "stride_wv", "H", "V"}
        return Source(
            fn,
            signature,
            {name: constants[name] for name in fn.arg_names if name in constants},
            aligned(*(name for name in arguments if name.endswith("_ptr") or name in multiples)),
            {"num_warps": tile.warps, "num_stages": tile.stages},
        )

    return source


FIELDS = {
    "_forward_kernel": "forward",
    "_recompute_kernel": "recompute",
    "_weight_kernel": "d_weight",
    "_hidden_kernel": "d_hidden",
}

KERNELS: list[Kernel] = [
    Kernel(f"margin{kernel} {dtype}", _margin(kernel, dtype), needs_tensor_cores=False)
    for kernel in ("_loss_kernel", "_loss_backward_kernel", "_sums_kernel", "_sums_backward_kernel")
    for dtype in ("fp32", "bf16")
]


KERNELS += [
    Kernel(
        f"head {FIELDS[kernel]} {dtype}" + (" softcap" if softcap else ""),
        _head(kernel, dtype, arch, softcap),
        archs=(arch,),
        needs_tensor_cores=dtype != "fp32",
    )
    for kernel in FIELDS
    for dtype in ("bf16", "fp32")
    for softcap in (False, True)
    for arch in (80, 90)
    # Only these two see the softcap. In fp32, which no tensor core serves, they spill a few bytes
    # with it in every tile tried.
    if not softcap or (kernel in ("_forward_kernel", "_recompute_kernel") and dtype == "bf16")
]


def measure(kernels: list[Kernel]) -> dict[str, Any]:
    """The triton version and one row per kernel and architecture; a failure is a row with it."""
    import triton

    rows = []
    for kernel in kernels:
        for arch in kernel.archs:
            row: dict[str, Any] = {"kernel": kernel.name, "arch": f"sm_{arch}"}
            try:
                row |= compile_resources(*kernel.source(), arch=arch)
            except Exception as error:  # of the compiler; the other kernels still count
                row["error"] = f"{type(error).__name__}: {error}"
            rows.append(row)
    return {"triton": triton.__version__, "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| kernel | arch | registers | spilled, bytes | shared, KiB | instructions |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        if "error" in row:
            found = ["–", "–", "–", row["error"].splitlines()[0].replace("|", "/")]
        else:
            counts = ", ".join(f"{count} {opcode}" for opcode, count in row["instructions"].items())
            shared = f"{row['shared_bytes'] / 1024:.2f}".rstrip("0").rstrip(".")
            found = [row["registers"], row["spill_bytes"], shared, counts or "–"]
        lines.append("| " + " | ".join(map(str, [row["kernel"], row["arch"], *found])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginning of kernels' names")
    parser.add_argument("--out", type=Path, help=f"where to write, by default {RESULTS}")
    arguments = parser.parse_args()
    names = tuple(arguments.names)
    kernels = [k for k in KERNELS if not names or k.name.startswith(names)]
    if not kernels:
        parser.error(f"no kernel's name begins with {' or '.join(names)}")
    results = measure(kernels)
    out = arguments.out or (None if names else RESULTS)
    if out is not None:
        out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["rows"]))


if __name__ == "__main__":
    main()
