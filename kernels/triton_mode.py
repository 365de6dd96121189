"""Whether Triton interprets its kernels. Importing this module imports triton."""

from __future__ import annotations

from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Triton reads this when it decorates a kernel, so it holds for all kernels or for none."""
