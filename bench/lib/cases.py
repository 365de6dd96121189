"""Named cases of the head benchmarks."""

from dataclasses import dataclass
from typing import Literal

import torch

from bench.lib.peaked import Distribution, PeakedCase, peaked_case


@dataclass(frozen=True)
class Case:
    """Sizes and contents of one head's inputs; `dtype` is the name of a torch dtype."""

    name: str
    tokens: int
    hidden_size: int
    vocab: int
    dtype: str = "float32"
    distribution: Distribution | Literal["real"] = "peaked"  # real: `bench.lib.states`
    entropy: float = 1.5
    seed: int = 0
    standard: bool = True  # False: sizes or an entropy that no bound of the tails was set for

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def logits_bytes(self) -> int:
        """Size of the logits in fp32, the dtype of a softmax: what memory is compared with."""
        return 4 * self.tokens * self.vocab

    def build(self, device: torch.device | str) -> PeakedCase:
        assert self.distribution != "real"
        return peaked_case(
            self.tokens,
            self.hidden_size,
            self.vocab,
            dtype=self.torch_dtype,
            device=device,
            distribution=self.distribution,
            entropy=self.entropy,
            seed=self.seed,
        )


_HEADS = {
    # tokens, hidden size, vocabulary
    "llama3-8b": (8192, 4096, 128256),
    "llama3-1b": (8192, 2048, 128256),
    "qwen2.5-7b": (4096, 3584, 152064),
    "gemma2-2b": (8192, 2304, 256000),
    "llama3-8b-16k": (16384, 4096, 128256),
}

CASES = {
    case.name: case
    for case in (
        Case("tiny", 96, 64, 2000),
        Case("cpu", 1024, 512, 131072),
        Case("cpu-flat", 1024, 512, 131072, distribution="flat"),
        Case("cpu-shuffled", 1024, 512, 131072, distribution="shuffled"),
        Case("cpu-bf16", 1024, 512, 131072, "bfloat16"),
        *(Case(name, *sizes, "bfloat16") for name, sizes in _HEADS.items()),
        *(Case(f"{name}-flat", *sizes, "bfloat16", "flat") for name, sizes in _HEADS.items()),
        *(
            Case(f"{name}-shuffled", *sizes, "bfloat16", "shuffled")
            for name, sizes in _HEADS.items()
        ),
    )
}
