"""Length-normalised margin loss of preference pairs, from per-token log-probabilities.

    mean_s = sum of the token logps of sequence s / its number of tokens      (0 for an empty one)
    x_i    = beta * (mean_chosen_i - mean_rejected_i) - target_margin_i
    sigmoid: loss_i = (1 - e) * softplus(-x_i) + e * softplus(x_i)            e = label_smoothing
    hinge:   loss_i = max(0, 1 - x_i)

Shapes: N tokens, P pairs. ``token_logps`` holds 2P sequences back to back, P chosen and then P
rejected; sequence s is ``token_logps[cu_seqlens[s]:cu_seqlens[s + 1]]``. Tokens past the last
sequence are padding. Half precision is computed in fp32, fp64 in fp64.

On a GPU nothing here reads a value back to the host. A token that is NaN reaches only its own pair,
forward and backward: sums are taken segment by segment, not as differences of a running sum. There
the kernels of `triton_kernels.py` do the same in one launch forward and one backward. Source of the
form: SimPO, arXiv 2405.14734.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Backend, check_tensors, choose_backend, is_number, refuse_transforms

Kind = Literal["sigmoid", "hinge"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# softplus(x) is x above this. torch's own threshold, 20, is off by 2e-9: visible in fp64.
_SOFTPLUS_THRESHOLD = 40.0


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``, which is ``-log sigmoid(-x)``, to fp64 precision everywhere."""
    return F.softplus(x, threshold=_SOFTPLUS_THRESHOLD)


def pair_losses(x: Tensor, kind: Kind = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """The loss of each pair, given its gap minus its target margin ``x`` [P]."""
    if kind == "hinge":
        return F.relu(1.0 - x)
    losses = softplus(-x)
    if label_smoothing == 0.0:
        return losses
    return (1.0 - label_smoothing) * losses + label_smoothing * softplus(x)


def _torch_margin_loss(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    target_margins: Tensor,
    beta: float,
    kind: Kind,
    label_smoothing: float,
) -> Tensor:
    sums = _torch_sums(token_logps, cu_seqlens)
    chosen_means, rejected_means = (sums / cu_seqlens.diff().clamp(min=1)).chunk(2)
    x = beta * (chosen_means - rejected_means) - target_margins.detach().to(sums.dtype)
    return pair_losses(x, kind, label_smoothing)


def _torch_sums(token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    values = token_logps if token_logps.dtype == torch.float64 else token_logps.float()
    # unsafe=True skips range checks that would wait for the device. Measured on one CPU core, 64k
    # tokens in 128 sequences, forward + backward: 0.10 ms, against 0.27 ms for repeat_interleave
    # and 0.96 ms for searchsorted with index_add, which is not deterministic on a GPU either.
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, unsafe=True)


def sequence_logps(
    token_logps: Tensor, cu_seqlens: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Summed logps and lengths of packed sequences; differentiable in ``token_logps``.

    Args:
        token_logps: [N] floating.
        cu_seqlens: [S + 1] int32 or int64, ascending, first 0, last at most N; equal neighbours
            are an empty sequence, whose sum is 0.
        backend: as in `margin_loss`.

    Returns:
        sums [S] in fp32 (fp64 for fp64) and lengths [S] in the dtype of ``cu_seqlens``.
    """
    _check_tokens(token_logps, cu_seqlens)
    lengths = cu_seqlens.diff()
    if choose_backend(backend, token_logps, token_logps.dtype) == "triton":
        from .triton_operators import sequence_sums

        refuse_transforms("sequence_logps", token_logps)
        return sequence_sums(token_logps, cu_seqlens), lengths
    # A copy, since backward reads the sums, and losses overwrite theirs (``sums /= lengths``).
    return _torch_sums(token_logps, cu_seqlens).clone(), lengths


def margin_loss(
    token_logps: Tensor,
    cu_seqlens: Tensor,
    target_margins: Tensor,
    *,
    beta: float,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Loss of each pair, [P]; differentiable in ``token_logps`` only.

    Args:
        token_logps: [N] floating.
        cu_seqlens: [2P + 1] int32 or int64: P chosen sequences, then P rejected.
        target_margins: [P], taken as constants.
        beta: scale of the gap of mean logps, > 0.
        kind: ``"sigmoid"`` or ``"hinge"``.
        label_smoothing: probability that a pair's label is wrong, in [0, 0.5]; sigmoid only.
        backend: ``"triton"`` (fp32, bf16 or fp16 on a GPU), ``"torch"``, or ``"auto"``: triton
            where it can, else torch.

    Returns:
        losses [P] in fp32 (fp64 for fp64).
    """
    _check_tokens(token_logps, cu_seqlens)
    _check_settings(cu_seqlens, target_margins, beta, kind, label_smoothing)
    settings = (beta, kind, label_smoothing)
    if choose_backend(backend, token_logps, token_logps.dtype) == "triton":
        from .triton_operators import margin_losses

        refuse_transforms("margin_loss", token_logps)
        return margin_losses(token_logps, cu_seqlens, target_margins, *settings)
    return _torch_margin_loss(token_logps, cu_seqlens, target_margins, *settings)


def _check_tokens(token_logps: Tensor, cu_seqlens: Tensor) -> None:
    check_tensors(token_logps=token_logps, cu_seqlens=cu_seqlens)
    if token_logps.dim() != 1 or not token_logps.is_floating_point():
        raise ValueError(
            "token_logps: expected a floating tensor of shape [N], got "
            f"{token_logps.dtype} of shape {list(token_logps.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens: expected an int32 or int64 tensor of shape [S + 1], got "
            f"{cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens: expected at least one boundary, got none")
    if cu_seqlens.device != token_logps.device:
        raise ValueError(
            f"cu_seqlens: expected the device of token_logps, {token_logps.device}, got "
            f"{cu_seqlens.device}"
        )
    _check_boundaries(cu_seqlens, token_logps.shape[0])


def _check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """On a CPU only, where values are at hand: memory past the tokens would be read."""
    holds_values = type(cu_seqlens) is Tensor and not torch.compiler.is_compiling()
    if cu_seqlens.device.type != "cpu" or not holds_values:
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > tokens or bounds != sorted(bounds):
        shown = f"{bounds[:3]} ... {bounds[-3:]}" if len(bounds) > 9 else bounds
        raise ValueError(
            f"cu_seqlens: expected ascending boundaries from 0 to at most {tokens}, got {shown}"
        )


def _check_settings(
    cu_seqlens: Tensor,
    target_margins: Tensor,
    beta: float,
    kind: str,
    label_smoothing: float,
) -> None:
    check_tensors(target_margins=target_margins)
    if cu_seqlens.numel() % 2 == 0:
        raise ValueError(
            "cu_seqlens: expected 2P + 1 boundaries (P chosen, then P rejected sequences), got "
            f"{cu_seqlens.numel()}"
        )
    pairs = cu_seqlens.numel() // 2
    if target_margins.shape != (pairs,):
        raise ValueError(
            f"target_margins: expected shape [{pairs}], one margin per pair, got "
            f"{list(target_margins.shape)}"
        )
    if target_margins.device != cu_seqlens.device:
        raise ValueError(
            f"target_margins: expected the device of token_logps, {cu_seqlens.device}, got "
            f"{target_margins.device}"
        )
    if not is_number(beta) or not beta > 0:
        raise ValueError(f"beta: expected a number above 0, got {beta!r}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not is_number(label_smoothing) or not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5], got {label_smoothing!r}")
    if kind == "hinge" and label_smoothing != 0:
        raise ValueError(
            f"label_smoothing: the hinge loss has none, got {label_smoothing!r}; use 0 or sigmoid"
        )
