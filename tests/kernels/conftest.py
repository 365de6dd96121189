"""Kernels run in Triton's interpreter, which is made quicker first."""

from __future__ import annotations

from widemargin.kernels.triton_mode import INTERPRETED

if INTERPRETED:
    from tests.support.quick_interpreter import quicken

    quicken()
