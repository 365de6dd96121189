"""The operators' namespace: one for each copy of the kernels in a process.

torch takes a second operator of the same name without a word, and every copy then runs the newer
one. A copy made for the Hub (`widemargin.integrations.hub`) has another namespace than this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "widemargin"


def operator(name: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.custom_op`` of this copy.

    Raises:
        ImportError: another copy of the kernels has this namespace.
    """
    operators: Any = getattr(torch.ops, NAMESPACE)
    owner = getattr(operators, "owner", None)
    if hasattr(operators, name) and owner != __file__:
        raise ImportError(
            f"widemargin: import one copy of its kernels in a process; {owner or 'another copy'} "
            f"already has the operators {NAMESPACE}::*, and {__file__} would replace them"
        )
    operators.owner = __file__
    return torch.library.custom_op(f"{NAMESPACE}::{name}", **options)
