"""What a Triton kernel costs on a chip that need not be there: compile, then read the binary.

The compiler and `cuobjdump` come with triton's package. Kernels decorated under TRITON_INTERPRET=1
cannot be compiled, and neither can others in the same process: run this in one without it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

# What a block may use at most, as the CUDA programming guide lists it per compute capability.
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}

# Matrix products; asynchronous copies to shared memory; spills (local memory); atomics.
TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA")
WATCHED = (*TENSOR_CORE, "LDGSTS", "UTMALDG", "LDL", "STL", "ATOM", "ATOMG", "RED", "REDG")

_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(.*?);", re.MULTILINE
)

Attributes = Mapping[str, list[list[Any]]]


def aligned(*names: str) -> Attributes:
    """``attrs`` of arguments divisible by 16, as triton finds fresh tensors and most strides."""
    return {name: [["tt.divisibility", 16]] for name in names}


def compile_resources(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    attrs: Attributes | None = None,
    options: Mapping[str, Any] | None = None,
    arch: int = 80,
) -> dict[str, Any]:
    """Compile a kernel for one architecture and say what it takes.

    Args:
        fn: a function decorated with ``triton.jit``.
        signature: type of each argument that is no constexpr: "*bf16", "i32", "fp32",
            "tensordesc<bf16[128,64]>".
        constexprs: value of each constexpr argument, and of arguments triton specialises on.
        attrs: of arguments, by name; see `aligned`.
        options: ``num_warps``, ``num_stages`` and so on.
        arch: compute capability, 80 for sm_80.

    Returns:
        registers per thread; spill_bytes per thread (stack and local memory); shared_bytes per
        block; instructions: how often each opcode of `WATCHED` occurs in the binary; outside_loop:
        see `outside_main_loop`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(fn, triton.JITFunction):
        raise ValueError(
            f"fn: expected a triton.jit function, got {type(fn).__name__}; "
            "unset TRITON_INTERPRET before triton is imported"
        )
    missing = [n for n in fn.arg_names if n not in signature and n not in constexprs]
    unknown = [n for n in (*signature, *constexprs, *(attrs or {})) if n not in fn.arg_names]
    if missing or unknown:
        raise ValueError(f"signature: {fn.__name__} misses {missing} and does not know {unknown}")
    types = {n: "constexpr" if n in constexprs else signature[n] for n in fn.arg_names}
    paths = {(fn.arg_names.index(name),): list(value) for name, value in (attrs or {}).items()}
    source = ASTSource(fn, types, dict(constexprs), paths)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options or {}))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        sass = _cuobjdump("--dump-sass", cubin.name)
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = Counter(opcode for _, _, opcode, _ in _INSTRUCTION.findall(sass))
    return {
        "registers": used["REG"],
        "spill_bytes": used["STACK"] + used["LOCAL"],
        # Triton asks for all of it at launch. The binary's own figure is static memory: none, or
        # the KiB that sm_90 keeps for itself, which the limit of 227 KiB has already given up.
        "shared_bytes": kernel.metadata.shared,
        "instructions": {opcode: counts[opcode] for opcode in WATCHED if counts[opcode]},
        "outside_loop": outside_main_loop(sass),
    }


def outside_main_loop(sass: str) -> int | None:
    """Instructions a thread runs outside its main loop, by the shortest way; None without products.

    The main loop is the innermost with most matrix products. The shortest way skips what a branch
    can skip: in the head's forward the parts for a target, a ragged end, and the profile of one
    token tile in several.
    """
    program = [
        (int(at, 16), opcode, rest, guard) for at, guard, opcode, rest in _INSTRUCTION.findall(sass)
    ]
    index = {at: i for i, (at, *_) in enumerate(program)}
    next_of: list[list[int]] = []
    for i, (_, opcode, rest, guard) in enumerate(program):
        jump = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        goes_on = opcode not in ("BRA", "EXIT", "RET") or bool(guard) or "P" in rest.split("0x")[0]
        next_of.append(([index[int(jump[1], 16)]] if jump else []) + [i + 1] * goes_on)
    loops = {(to, i) for i, all_to in enumerate(next_of) for to in all_to if to < i}
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]

    def products(loop: tuple[int, int]) -> int:
        return sum(opcode in TENSOR_CORE for _, opcode, *_ in program[loop[0] : loop[1] + 1])

    begin, end = max(inner, key=products, default=(0, -1))
    if not products((begin, end)):
        return None
    exits = {i for i, (_, opcode, *_) in enumerate(program) if opcode == "EXIT"}
    return _steps(next_of, 0, {begin}) + _steps(next_of, end + 1, exits) + 1


def _steps(next_of: list[list[int]], start: int, ends: set[int]) -> int:
    """Edges of the shortest way from ``start`` to one of ``ends``."""
    steps, reached, edge = 0, {start}, {start}
    while edge and not edge & ends:
        edge = {to for i in edge for to in next_of[i] if to < len(next_of)} - reached
        reached |= edge
        steps += 1
    return steps


def _cuobjdump(*arguments: str) -> str:
    from triton import knobs

    done = subprocess.run(
        [knobs.nvidia.cuobjdump.path, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout
