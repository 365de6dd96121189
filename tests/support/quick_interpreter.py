"""Triton's interpreter without what it works out again at every operation.

It lists the members of Triton's language at each call of a kernel's function, builds a table of
dtypes for each operation, and a type and a shape of constants for each result: together half of a
kernel test's time. What is computed stays as it is.
"""

from __future__ import annotations

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Keep these from the first time on, for all tests of this process."""
    _keep_members()
    _keep_dtypes()
    _keep_shapes()
    _keep_types()


def _keep_members() -> None:
    patched: Any = interpreter
    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, *rest: Any) -> None:
        if package not in names:
            members = inspect.getmembers(package, tl.core.is_builtin)
            names[package] = [name for name, _ in members]
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # and none that the kernel's caller has patched
                patched._patch_attr(package, name, member, *rest)

    patched._patch_builtin = patch_builtin


def _keep_dtypes() -> None:
    patched: Any = interpreter
    dtype_of = patched._get_np_dtype
    dtypes: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = dtype_of(scalar)
        return dtypes[scalar.name]

    patched._get_np_dtype = get_np_dtype


def _keep_shapes() -> None:
    tensor: Any = tl.core.tensor
    init, shapes = tensor.__init__, {}

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(_values(type.shape)) if type.is_block() else ()
        if key not in shapes:
            init(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    tensor.__init__ = tensor_init


def _keep_types() -> None:
    block_type: Any = tl.core.block_type
    init, types = block_type.__init__, {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in _values(shape))
        if key not in types:
            init(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    block_type.__init__ = block_init


def _values(shape: Any) -> Any:
    """The sizes, of Triton's own kind of tuple or of Python's."""
    return getattr(shape, "values", shape)
