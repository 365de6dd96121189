"""Versions of the packages that a run depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("widemargin", "torch", "triton", "transformers", "accelerate", "datasets", "peft")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a run depends on."""
    present = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            present[package] = version(package)
        except PackageNotFoundError:
            continue
    return present
