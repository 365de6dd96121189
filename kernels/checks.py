"""Checks that the public functions share: ``ValueError`` names what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def expect(fine: bool, name: str, expected: str, got: object) -> None:
    if not fine:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensors(**given: object) -> None:
    """Raise ``ValueError`` for the first that is not a tensor."""
    for name, value in given.items():
        expect(isinstance(value, Tensor), name, "a tensor", type(value).__name__)


def is_number(value: Any) -> bool:
    """Whether it is a finite number of Python's (or ``torch.compile``'s stand-in for one)."""
    numbers = (int, float, torch.SymInt, torch.SymFloat)
    return isinstance(value, numbers) and -math.inf < value < math.inf
