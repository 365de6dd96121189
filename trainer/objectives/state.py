"""What an objective carries from one micro-batch to the next: a plain dict of named tensors.

Objectives are pure functions that take a state and return the next one, so evaluation cannot
change it and a checkpoint is a copy of the dict. Statistics are fp64 whatever the logps are: they
are a few numbers, and a resumed or differently sharded run then continues bit for bit. A random
generator is kept as its state, a uint8 tensor on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def seeded_generator(seed: int) -> Tensor:
    """State of a CPU generator with this seed."""
    return torch.Generator().manual_seed(seed).get_state()


def draw_uniform(generator_state: Tensor, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``size`` numbers in [0, 1), fp64, on ``device``, and the generator's next state.

    Drawn on the CPU so that they are the same for every device, and copied without waiting.
    """
    generator = torch.Generator()
    generator.set_state(generator_state)
    pin = device.type == "cuda"
    keys = torch.rand(size, generator=generator, dtype=torch.float64, pin_memory=pin)
    return keys.to(device, non_blocking=True), generator.get_state()
