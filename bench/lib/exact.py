"""The fp64 answer a provider is compared with, computed a chunk of vocabulary at a time.

logp_i = z_iy − lse_i with z = hidden @ weight.T; for coefficients g the gradient in z is
g·(onehot(y) − softmax).
Extra memory: the gradients in fp64 and some chunks of [N, v].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.lib.peaked import PeakedCase

CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Exact:
    logp: Tensor  # [N] fp64
    dhidden: Tensor  # [N, H] fp64
    dweight: Tensor  # [V, H] fp64


@torch.no_grad()
def exact(case: PeakedCase) -> Exact:
    hidden, targets = case.hidden.double(), case.targets
    vocab = len(case.weight)
    chunk = max(1, CHUNK_BYTES // (8 * len(hidden)))
    starts = range(0, vocab, chunk)

    def rows(start: int) -> Tensor:
        return case.weight[start : start + chunk].double()

    lse = torch.stack([(hidden @ rows(start).T).logsumexp(-1) for start in starts]).logsumexp(0)
    target_logits = (hidden * case.weight[targets].double()).sum(-1)
    coefficients = case.coefficients.double()
    dhidden = torch.zeros_like(hidden)
    dweight = hidden.new_empty(case.weight.shape)
    for start in starts:
        weight = rows(start)
        grad = (hidden @ weight.T).sub_(lse[:, None]).exp_().mul_(-coefficients[:, None])
        inside = (targets >= start) & (targets < start + len(weight))
        grad[inside, targets[inside] - start] += coefficients[inside]
        dhidden.addmm_(grad, weight)
        torch.mm(grad.T, hidden, out=dweight[start : start + len(weight)])
    return Exact(target_logits - lse, dhidden, dweight)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖ in fp64, by chunks; inf where anything is not finite."""
    if value.shape != reference.shape:
        raise ValueError(f"shape {tuple(value.shape)} found, {tuple(reference.shape)} expected")
    rows = max(1, CHUNK_BYTES // (8 * max(1, reference[:1].numel())))
    squares = [
        torch.stack([(a.double() - b).square().sum(), b.square().sum()])
        for a, b in zip(value.split(rows), reference.split(rows), strict=True)
    ]
    difference, size = torch.stack(squares).sum(0).sqrt().tolist()
    error = difference / size if size else difference
    return error if error == error else float("inf")
