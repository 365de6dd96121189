"""A process has one copy of the operators of a namespace."""

from __future__ import annotations

import runpy

import pytest
import torch
from widemargin.kernels import namespace
from widemargin.kernels.linear_logprob import linear_logprob


def test_another_copy_is_refused(tmp_path):
    """torch would run its code for this copy's calls."""
    path = tmp_path / "namespace.py"
    with open(namespace.__file__, encoding="utf-8") as file:
        path.write_text(file.read(), encoding="utf-8")
    operator = runpy.run_path(str(path))["operator"]
    with pytest.raises(ImportError, match=r"import one copy of its kernels in a process; .*names"):
        operator("linear_logprob", mutates_args=())
    assert torch.ops.widemargin.owner == namespace.__file__
    logps = linear_logprob(torch.randn(2, 4), torch.randn(9, 4), torch.arange(2))
    assert logps.isfinite().all()


def test_this_copy_may_be_loaded_again():
    """As a notebook does with a file that has changed."""

    @namespace.operator("tried_twice", mutates_args=())
    def first(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @namespace.operator("tried_twice", mutates_args=())
    def second(x: torch.Tensor) -> torch.Tensor:
        return x + 2

    assert second(torch.zeros(1)) == 2
    assert first is not second
