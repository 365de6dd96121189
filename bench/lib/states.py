"""A real model's hidden states as a case, in a file that travels to machines without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench.lib.cases import Case
from bench.lib.peaked import PeakedCase, mean_entropy


@dataclass(frozen=True, kw_only=True)
class StatesCase(Case):
    """States that `save_states` wrote, with logits ``factor`` times as large."""

    path: Path
    factor: float

    def build(self, device: torch.device | str) -> PeakedCase:
        states = PeakedCase(**_load(self.path, device))
        return sharpened(states, self.factor)


def sharpened(case: PeakedCase, factor: float) -> PeakedCase:
    """The same tokens with logits ``factor`` times as large."""
    hidden = case.hidden * factor
    entropy = mean_entropy(hidden, case.weight)
    return PeakedCase(hidden, case.weight, case.targets, case.coefficients, entropy, factor)


def save_states(case: PeakedCase, path: Path) -> None:
    """Write the case with hidden states and weight in bf16, half the size."""
    content = {field.name: getattr(case, field.name) for field in fields(case)}
    halves = {name: content[name].to(torch.bfloat16) for name in ("hidden", "weight")}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | halves, path)


def states_cases(path: Path, factors: Sequence[float] = (1.0, 2.0)) -> dict[str, Case]:
    """A case for each factor, named after the file."""
    shapes = _load(path, "meta")
    tokens, width = shapes["hidden"].shape
    names = {f: path.stem + (f", logits x {f:g}" if f != 1 else "") for f in factors}
    return {
        name: StatesCase(
            name, tokens, width, len(shapes["weight"]), "bfloat16", "real", 0.0,
            standard=False, path=path, factor=factor,
        )
        for factor, name in names.items()
    }  # fmt: skip


def _load(path: Path, device: torch.device | str) -> dict[str, Any]:
    return torch.load(path, map_location=device)
