"""The head's inputs where its Triton kernels run: interpreted on a CPU, native with CUDA."""

from __future__ import annotations

import torch
from widemargin.kernels.linear_logprob.triton_forward import forward
from widemargin.kernels.linear_logprob.types import HeadCall

from tests.support.head_cases import make

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs_of(n, h, v, **options):
    hidden, weight, targets, bias, grad = make(n, h, v, torch.float32, **options)
    leaves = [
        x if x is None else x.detach().to(DEVICE).requires_grad_() for x in (hidden, weight, bias)
    ]
    return leaves[0], leaves[1], targets.to(DEVICE), leaves[2], grad.to(DEVICE)


def saved_forward(hidden, weight, targets, bias=None, **options):
    """The head's call and what its forward keeps, past the public function."""
    scale, cap = options.get("logit_scale", 1.0), options.get("softcap")
    call = HeadCall(hidden, weight, bias, scale, cap, hidden.dtype)
    with torch.no_grad():
        return call, forward(call, targets, keep=True, profile=True, tops=True)
