"""Paths of the machine at hand, told from names that mean something elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def unplaced(value: Any) -> Any:
    """Names and settings with a folder or file of this machine as its last component alone.

    A card is for the hub, where paths say nothing but who trained where.
    """
    if isinstance(value, Mapping):
        return {unplaced(key): unplaced(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [unplaced(part) for part in value]
    return Path(value).name or "folder" if isinstance(value, str) and is_place(value) else value


def is_place(name: str) -> bool:
    """Whether a text is a path of this machine: one that is there, or could not be elsewhere."""
    if name.startswith(("/", "~", "./", "../")):
        return True
    try:
        return "/" in name and Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or no text for one
        return False
