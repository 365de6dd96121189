"""An objective's running state: tensors by name, made, drawn from, moved and checked.

Generators are in it as their state, of dtype uint8, on the CPU.
"""

from __future__ import annotations

from typing import Any

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
    check_state(name, mine, saved, "take one that was saved with this objective")
    return {
        key: saved[f"{name}.{key}"].cpu().clone()
        if value.dtype == torch.uint8
        else saved[f"{name}.{key}"].clone()
        for key, value in current.items()
    }


def check_state(name: str, expected: State, given: State, remedy: str) -> None:
    """Raise ``UserError`` unless its tensors have the names, shapes and dtypes of ``expected``."""
    mine, other = ({key: _layout(value) for key, value in it.items()} for it in (expected, given))
    if mine != other:
        raise UserError(
            f"state of objective {name!r}: {remedy}; expected {_listed(mine)}, got {_listed(other)}"
        )


def _layout(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _listed(layouts: dict[str, str]) -> str:
    return ", ".join(f"{key} ({layout})" for key, layout in sorted(layouts.items())) or "nothing"
