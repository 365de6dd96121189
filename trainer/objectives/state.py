"""What an objective carries from one micro-batch to the next: a plain dict of named tensors.

Objectives are pure functions that take a state and return the next one, so evaluation cannot
change it and a checkpoint is a copy of the dict. Statistics are fp64 whatever the logps are: they
are a few numbers, and a resumed or differently sharded run then continues bit for bit. A random
generator is kept as its state, a uint8 tensor on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

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


def to_device(state: State, device: torch.device) -> State:
    """The state on ``device``, but for generators (uint8), which stay on the CPU."""
    return {
        key: value if value.dtype == torch.uint8 else value.to(device)
        for key, value in state.items()
    }


def taken_up(name: str, current: State, saved: State) -> State:
    """A copy of what the objective ``name`` saved, in place of its ``current`` state.

    Raises:
        UserError: it is the state of another objective, or is damaged.
    """
    mine = {f"{name}.{key}": value for key, value in current.items()}
    if saved.keys() != mine.keys():
        raise UserError(
            f"state of objective {name!r}: expected {_listed(mine)}, got {_listed(saved)}; was it "
            "saved with another objective?"
        )
    for key, value in mine.items():
        other = saved[key]
        if not isinstance(other, Tensor) or _layout(other) != _layout(value):
            got = _layout(other) if isinstance(other, Tensor) else type(other).__name__
            raise UserError(
                f"state of objective {name!r}, {key}: expected {_layout(value)}, got {got}"
            )
    return {
        key: saved[f"{name}.{key}"].cpu().clone()
        if value.dtype == torch.uint8
        else saved[f"{name}.{key}"].clone()
        for key, value in current.items()
    }


def _layout(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"


def _listed(state: State) -> str:
    return ", ".join(sorted(state)) or "nothing"
