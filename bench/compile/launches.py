"""What the head's launches compile, on a chip that need not be there.

Triton's own launch path runs: it specialises on the arguments, compiles for the chip and looks the
result up at the next call. A driver that does nothing stands in for CUDA's, so that kernels are
counted and not executed, and the tensors' values mean nothing. `python -m bench.compile.launches`
prints what it found.
"""

from __future__ import annotations

import argparse
import json
from typing import Any
from unittest import mock

import torch

SIZES = (1, 2, 16, 17, 128, 256, 1000, 1024, 2048, 4096, 4097)
"""Tokens of the calls after the first: 1, multiples of 16, and others, which Triton tells apart."""
FIRST, WIDTH, VOCABULARY = 300, 256, 2000


class _Utils:
    def __init__(self, arch: int, compiled: list[str]) -> None:
        self.arch, self.compiled = arch, compiled

    def get_device_properties(self, device: int) -> dict[str, int]:
        from .triton_compile import SHARED_LIMIT_BYTES

        found = {"max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
        return found | {"max_shared_mem": SHARED_LIMIT_BYTES[self.arch]}

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        self.compiled.append(name)
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads


class StubDriver:
    """As much of Triton's driver as launching asks for.

    compiled: names, in order. unfused: of those whose multiply-adds are two instructions.
    """

    def __init__(self, arch: int) -> None:
        self.arch, self.launched = arch, 0
        self.compiled: list[str] = []
        self.unfused: list[str] = []
        self.utils = _Utils(arch, self.compiled)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        if not metadata.enable_fp_fusion:
            self.unfused.append(metadata.name)

        def launch(*_: Any) -> None:
            self.launched += 1

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def one_call(arch: int, tokens: int) -> None:
    """Forward, with and without the entropy, and backward in bf16, as the operators launch them.

    On sm_90 backward by descriptors too.
    """
    from widemargin.kernels.linear_logprob import tiles, triton_backward, triton_forward
    from widemargin.kernels.linear_logprob.types import Asked, GradRequest, HeadCall

    from bench.head.forwards.tma import with_descriptors

    hidden = torch.zeros(tokens, WIDTH, dtype=torch.bfloat16)
    weight = torch.zeros(VOCABULARY, WIDTH, dtype=torch.bfloat16)
    targets, scored = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens, dtype=torch.bool)
    call = HeadCall(hidden, weight, None, 1.0, None, torch.bfloat16)
    request = GradRequest(torch.ones(tokens), scored, 2**-12, True, True, False)
    with (
        mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),  # nothing is written
        mock.patch.object(triton_forward, "tiles_for", return_value=tiles.HALF[arch]),
        mock.patch.object(triton_backward, "tiles_for", return_value=tiles.HALF[arch]),
        mock.patch.object(triton_backward, "_fp32_product", lambda a, b: a.float() @ b.float()),
    ):
        kept: dict[str, Any] = {"keep": True, "profile": True, "tops": True}
        triton_forward.forward(call, targets, **kept, asked=Asked(entropy=True))
        saved = triton_forward.forward(call, targets, **kept)
        triton_backward.backward(call, saved, request)
        if arch >= 90:
            described = with_descriptors(tiles.HALF[arch])
            triton_backward.backward(call, saved, request, described)


def measure(arch: int) -> dict[str, Any]:
    """Kernels that the first call compiled, and those of each later size, which should be none."""
    import triton

    driver: Any = StubDriver(arch)
    triton.runtime.driver.set_active(driver)
    one_call(arch, FIRST)
    first, later = sorted(driver.compiled), {}
    for tokens in SIZES:
        before = len(driver.compiled)
        one_call(arch, tokens)
        later[tokens] = driver.compiled[before:]
    counts = {"launched": driver.launched, "unfused": driver.unfused}
    return {"arch": arch, "first": first, "later": later, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile.launches", description=__doc__)
    parser.add_argument("--arch", type=int, choices=(80, 90), default=90)
    print(json.dumps(measure(parser.parse_args().arch)))


if __name__ == "__main__":
    main()
