"""Triton's interpreter without what it works out again at every call.

It lists the members of Triton's language at each call of a kernel's function, and builds a table of
dtypes at each operation: a fifth of a kernel test's time.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Keep both from the first time on, for all tests of this process."""
    patched: Any = interpreter
    dtype_of, names, dtypes = patched._get_np_dtype, {}, {}

    def patch_builtin(package: Any, *rest: Any) -> None:
        if package not in names:
            members = inspect.getmembers(package, tl.core.is_builtin)
            names[package] = [name for name, _ in members]
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # and none that the kernel's caller has patched
                patched._patch_attr(package, name, member, *rest)

    def get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = dtype_of(scalar)
        return dtypes[scalar.name]

    patched._patch_builtin, patched._get_np_dtype = patch_builtin, get_np_dtype
