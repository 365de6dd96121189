"""Tells paths of this machine from names that mean something on others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def unplaced(value: Any) -> Any:
    """Names and settings in which a path of this machine is cut to its last component.

    Readers elsewhere learn nothing from the rest of a path but who trained where.
    """
    if isinstance(value, Mapping):
        return {unplaced(key): unplaced(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [unplaced(part) for part in value]
    return Path(value).name or "folder" if isinstance(value, str) and is_place(value) else value


def is_place(name: str) -> bool:
    """Whether a name is a path of this machine, by its form or because the path exists."""
    if name.startswith(("/", "~", "./", "../")):
        return True
    try:
        return "/" in name and Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or no text for one
        return False
