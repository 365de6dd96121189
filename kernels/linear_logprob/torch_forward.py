"""The head's forward in torch: chunked products whose logits are reduced at once.

The fast path on a CPU and the fallback elsewhere. The mathematics stand in `function.py`.

Shapes: N tokens, H hidden, V vocabulary, B blocks of ``BLOCK`` vocabulary rows.
Products are fp32 (fp64 for fp64 inputs) whatever the inputs' dtype, so logits are never rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .extras import BlockSums
from .routing import BLOCK, blocked, num_blocks
from .types import Asked, HeadCall, Saved

ROWS = 1024
"""Tokens per product: a chunk of logits [ROWS, COLUMNS] stays in a core's cache."""
COLUMNS = 16 * BLOCK
"""Vocabulary rows per product."""


def forward(
    call: HeadCall,
    targets: Tensor,
    *,
    keep: bool,
    profile: bool,
    tops: bool,
    asked: Asked | None = None,
) -> Saved:
    """Log-probs of ``targets`` [N] (in [0, V)) and what backward needs.

    Args:
        keep: whether backward will follow; without it ``partial_lse`` has no rows.
        profile: whether to average each block's distribution inside itself over the tokens.
        tops: whether to keep each block's largest element apart.
        asked: for which `Extras`, if for any.
    """
    rows, vocabulary = len(call.hidden), len(call.weight)
    dtype = torch.promote_types(call.compute_dtype, torch.float32)
    new = call.hidden.new_empty
    partial_lse = new(num_blocks(vocabulary), rows, dtype=dtype)
    target_logits = new(rows, dtype=dtype)
    largest = new(num_blocks(vocabulary) if tops else 0, rows, dtype=torch.int32)
    column_sums = new(num_blocks(vocabulary), BLOCK if profile else 0, dtype=dtype).zero_()
    counts = column_sums.new_zeros(num_blocks(vocabulary), 1)
    buffer = new(min(rows, ROWS) * COLUMNS, dtype=dtype)
    block_sums = None if asked is None else BlockSums(asked, partial_lse)
    operands = operand(call, call.hidden)
    for start in range(0, vocabulary, COLUMNS):
        weight = operand(call, call.weight[start : start + COLUMNS])  # cast once for all tokens
        for row in range(0, rows, ROWS):
            hidden = operands[row : row + ROWS]
            tokens = slice(row, row + len(hidden))
            chunk = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
            z = logits(call, hidden, weight, start, chunk)
            _pick_targets(z, targets[tokens], start, target_logits[tokens])
            slope = softcap_slope(z, call.softcap) if profile and call.softcap else None
            blocks = slice(start // BLOCK, num_blocks(start + len(weight)))
            if block_sums is not None:
                block_sums.add_logits(z, (blocks, tokens))
            z, sums = _reduce(z, partial_lse[blocks, tokens])
            if block_sums is not None:
                block_sums.add_exponentials(blocked(z), sums, (blocks, tokens))
            if tops:
                largest[blocks, tokens] = _pack_tops(blocked(z), sums).T
            if profile:
                inside = z if slope is None else z[:, : len(weight)].mul_(slope)
                _add_profile(blocked(inside), sums, column_sums[blocks], counts[blocks])
    lse = partial_lse.logsumexp(0)
    column_sums /= counts.clamp_min_(1)
    profiles = column_sums.view(-1)[:vocabulary] if profile else column_sums.view(-1)
    saved = Saved(targets, target_logits - lse, lse, partial_lse, profiles, largest)
    if block_sums is not None:
        saved = saved._replace(extras=block_sums.extras(saved, vocabulary))
    return saved if keep else saved._replace(partial_lse=partial_lse[:0])


def operand(call: HeadCall, tensor: Tensor) -> Tensor:
    """Rounded to the compute dtype, as `F.linear` under autocast would, for `product`.

    CUDA sums half precision in fp32; on a CPU the products' inputs are widened to fp32.
    """
    rounded = tensor.to(call.compute_dtype)
    if call.weight.is_cuda:
        return rounded
    return rounded.to(torch.promote_types(call.compute_dtype, torch.float32))


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right`` of operands in fp32 (fp64 for fp64), into ``out`` if given."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    if left.dtype == dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += product(left, right)


def logits(
    call: HeadCall, hidden: Tensor, weight: Tensor, start: int, out: Tensor | None = None
) -> Tensor:
    """Logits [n, v] of operands ``hidden`` [n, H], ``weight`` [v, H]; ``start``: first row."""
    z = product(hidden, weight.T, out)
    if call.bias is not None:
        z += call.bias[start : start + len(weight)].to(call.compute_dtype)
    if call.logit_scale != 1.0:
        z *= call.logit_scale
    if call.softcap is not None:
        z.div_(call.softcap).tanh_().mul_(call.softcap)
    return z


def softcap_slope(logits: Tensor, softcap: float) -> Tensor:
    """Derivative of the softcap where its output is ``logits``."""
    return 1.0 - (logits / softcap).square_()


def _pick_targets(z: Tensor, targets: Tensor, start: int, out: Tensor) -> None:
    """Copy to ``out`` [n] the logits of those targets that lie in this chunk."""
    column = targets - start
    inside = (column >= 0) & (column < z.shape[1])
    picked = z.gather(1, column.clamp_(0, z.shape[1] - 1)[:, None])[:, 0]
    torch.where(inside, picked, out, out=out)


def _reduce(z: Tensor, partial_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, v], overwritten, to their exponentials relative to each block's maximum.

    Writes the blocks' logsumexps to ``partial_lse`` [v / BLOCK, n]; returns the exponentials
    [n, v padded] and their sums [n, v / BLOCK].
    """
    blocks = blocked(z, fill=-torch.inf)
    top = blocks.amax(-1).clamp_min_(torch.finfo(z.dtype).min)
    blocks.sub_(top[..., None]).exp_()
    sums = blocks.sum(-1)
    partial_lse.copy_(top.add_(sums.log()).T)
    return blocks.view(len(z), -1), sums


def _pack_tops(inside: Tensor, sums: Tensor) -> Tensor:
    """`Saved.tops` [n, b] of exponentials [n, b, BLOCK] whose largest is 1, and their sums [n, b].

    Bits of numbers in [0, 1] are in the numbers' order, and those of 1 end in zeros: with the
    column put in, the last of a block's largest elements is the largest integer.
    """
    whole = torch.int64 if inside.dtype == torch.float64 else torch.int32
    columns = torch.arange(BLOCK, dtype=whole, device=inside.device)
    found = torch.bitwise_or(inside.view(whole), columns).amax(-1).bitwise_and_(BLOCK - 1)
    shares = sums.reciprocal().to(torch.float32).view(torch.int32)
    return shares.bitwise_and_(-BLOCK).bitwise_or_(found.to(torch.int32))


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


def profile_means(call: HeadCall, profile: Tensor) -> Tensor:
    """Each block's average weight row under its profile, [B, H]: one reading of the weight."""
    vocabulary, width = call.weight.shape
    means = profile.new_empty(num_blocks(vocabulary), width)
    for start in range(0, vocabulary, COLUMNS):
        weight = operand(call, call.weight[start : start + COLUMNS]).to(profile.dtype)
        inside = profile[start : start + len(weight)]
        missing = -len(weight) % BLOCK
        if missing:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, missing))
            inside = torch.nn.functional.pad(inside, (0, missing))
        blocks = slice(start // BLOCK, (start + len(weight)) // BLOCK)
        shape = (-1, BLOCK, width)
        means[blocks] = torch.bmm(inside.view(-1, 1, BLOCK), weight.view(shape))[:, 0]
    return means
