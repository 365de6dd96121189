"""The head in torch: chunked products, the same routing and tails as the kernels.

The fast path on a CPU and the fallback elsewhere. The mathematics stand in `linear_logprob.py`.

Shapes: N tokens, H hidden, V vocabulary, B blocks of ``BLOCK`` vocabulary rows.
Products are fp32 (fp64 for fp64 inputs) whatever the inputs' dtype, so logits are never rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .routing import BLOCK, num_blocks

ROWS = 1024
"""Tokens per product: a chunk of logits [ROWS, COLUMNS] stays in a core's cache."""
COLUMNS = 16 * BLOCK
"""Vocabulary rows per product."""


@dataclass(frozen=True)
class Head:
    """One call's inputs and how to read them in the dtype of the products."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    compute_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, statistics and accumulators."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        """Of the products' inputs: CUDA sums half precision in fp32, a CPU is handed fp32."""
        return self.compute_dtype if self.weight.is_cuda else self.dtype

    def operand(self, tensor: Tensor) -> Tensor:
        """Rounded to the compute dtype, as `F.linear` under autocast would, then widened."""
        return tensor.to(self.compute_dtype).to(self.operand_dtype)

    def product(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """``left @ right`` in `dtype`, into ``out`` if given."""
        if left.dtype == self.dtype:
            return torch.mm(left, right, out=out)
        return torch.mm(left, right, out_dtype=self.dtype, out=out)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """``total += left @ right``."""
        if left.dtype == self.dtype:
            total.addmm_(left, right)
        else:
            total += self.product(left, right)

    def logits(
        self, hidden: Tensor, weight: Tensor, start: int, out: Tensor | None = None
    ) -> Tensor:
        """Logits [n, v] of operands ``hidden`` [n, H], ``weight`` [v, H]; ``start``: first row."""
        z = self.product(hidden, weight.T, out)
        if self.bias is not None:
            z += self.bias[start : start + len(weight)].to(self.compute_dtype)
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def softcap_slope(self, logits: Tensor) -> Tensor:
        """Derivative of the softcap where its output is ``logits``."""
        assert self.softcap is not None
        return 1.0 - (logits / self.softcap).square_()

    def own_coefficients(self, grad: Tensor, logps: Tensor, targets: Tensor) -> Tensor:
        """``g (1 - p)`` [N], the targets' own elements of G, from 1 - p as such; with softcap."""
        own = grad * -torch.expm1(logps)
        return own if self.softcap is None else own * self.target_slopes(targets)

    def target_slopes(self, targets: Tensor) -> Tensor:
        """Derivative of the softcap at each token's target [N], from the logit before it.

        ``1 / cosh^2`` keeps its digits where the softcap saturates, as ``1 - tanh^2`` does not.
        """
        assert self.softcap is not None
        logits = targets.new_empty(targets.shape, dtype=self.dtype)
        for row in range(0, len(targets), ROWS):
            here = slice(row, row + ROWS)
            weight = self.operand(self.weight[targets[here]]).to(self.dtype)
            logits[here] = (self.operand(self.hidden[here]).to(self.dtype) * weight).sum(1)
        if self.bias is not None:
            logits += self.bias[targets].to(self.compute_dtype)
        return torch.cosh(logits * (self.logit_scale / self.softcap)).pow(-2)


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """Keep fp32 products IEEE: no TF32 or bf16 in place of fp32, whatever the global setting."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    backends = [backend for backend in backends if backend is not None]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def forward(head: Head, targets: Tensor, *, keep: bool, profile: bool) -> tuple[Tensor, ...]:
    """Log-probs of ``targets`` [N] (in [0, V)) and what backward needs.

    Returns:
        logps [N]; lse [N]; partial_lse [B, N] (no rows unless ``keep``); profile [V] (empty unless
        ``profile``): each block's distribution inside itself, averaged over tokens.
    """
    rows, vocabulary = len(head.hidden), len(head.weight)
    new = head.hidden.new_empty
    partial_lse = new(num_blocks(vocabulary), rows, dtype=head.dtype)
    target_logits = new(rows, dtype=head.dtype)
    column_sums = new(num_blocks(vocabulary), BLOCK if profile else 0, dtype=head.dtype).zero_()
    counts = column_sums.new_zeros(num_blocks(vocabulary), 1)
    buffer = new(min(rows, ROWS) * COLUMNS, dtype=head.dtype)
    for row in range(0, rows, ROWS):
        hidden = head.operand(head.hidden[row : row + ROWS])
        here = slice(row, row + len(hidden))
        for start in range(0, vocabulary, COLUMNS):
            weight = head.operand(head.weight[start : start + COLUMNS])
            chunk = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
            z = head.logits(hidden, weight, start, chunk)
            _pick_targets(z, targets[here], start, target_logits[here])
            slope = head.softcap_slope(z) if profile and head.softcap is not None else None
            blocks = slice(start // BLOCK, num_blocks(start + len(weight)))
            z, sums = _reduce(z, partial_lse[blocks, here])
            if profile:
                inside = z if slope is None else z[:, : len(weight)].mul_(slope)
                _add_profile(_blocked(inside), sums, column_sums[blocks], counts[blocks])
    lse = partial_lse.logsumexp(0)
    column_sums /= counts.clamp_min_(1)
    profiles = column_sums.view(-1)[:vocabulary] if profile else column_sums.view(-1)
    return target_logits - lse, lse, partial_lse if keep else partial_lse[:0], profiles


def _pick_targets(z: Tensor, targets: Tensor, start: int, out: Tensor) -> None:
    """Copy to ``out`` [n] the logits of those targets that lie in this chunk."""
    column = targets - start
    inside = (column >= 0) & (column < z.shape[1])
    picked = z.gather(1, column.clamp_(0, z.shape[1] - 1)[:, None])[:, 0]
    torch.where(inside, picked, out, out=out)


def _blocked(chunk: Tensor, fill: float = 0.0) -> Tensor:
    """[n, v] as [n, v / BLOCK, BLOCK]; a ragged last block is filled up."""
    missing = -chunk.shape[1] % BLOCK
    if missing:
        chunk = torch.nn.functional.pad(chunk, (0, missing), value=fill)
    return chunk.view(len(chunk), -1, BLOCK)


def _reduce(z: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, v], overwritten, to their exponentials relative to each block's maximum.

    Writes the blocks' logsumexps to ``partial_lse`` [v / BLOCK, n]; returns the exponentials
    [n, v padded] and their sums [n, v / BLOCK].
    """
    blocks = _blocked(z, fill=-torch.inf)
    top = blocks.amax(-1).clamp_min_(torch.finfo(z.dtype).min)
    blocks.sub_(top[..., None]).exp_()
    sums = blocks.sum(-1)
    partial_lse.copy_(top.add_(sums.log()).T)
    return blocks.view(len(z), -1), sums


def _add_profile(inside: Tensor, sums: Tensor, column_sums: Tensor, counts: Tensor) -> None:
    """Add each token's distribution inside the blocks to ``column_sums`` [b, BLOCK].

    Args:
        inside: [n, b, BLOCK], exponentials. sums: [n, b], their sums. counts: [b, 1].
    """
    weights = sums.reciprocal()
    finite = torch.isfinite(weights) & (weights > 0)
    if not inside.is_cuda and not bool(finite.all()):
        inside = torch.where(finite[..., None], inside, 0.0)
    weights = torch.where(finite, weights, 0.0)
    column_sums += torch.bmm(weights.T[:, None], inside.transpose(0, 1))[:, 0]
    counts += finite.sum(0)[:, None]
