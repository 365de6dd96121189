"""The head where each rank of a group holds a part of the vocabulary (tensor parallelism).

Hidden states and targets are the same on all ranks, and rank r holds the rows after those of the
ranks before it. The operators of `linear_logprob` work on its rows, and collectives stand around
them:

    lse_r, logp_r   forward over the rank's own rows; o is the rank that holds the target
    logp = logp_o - logsumexp_r (lse_r - lse_o)   all-gather of [2, N], of more with extras
    lse  = lse_o + logsumexp_r (lse_r - lse_o)
    dW_r, db_r, dH_r   backward over the rank's own rows, with lse in place of lse_r
    dH = sum_r dH_r                               all-reduce of [N, H]

Masses are shares of the distribution over all rows, so ``tail_eps`` means what it means on one
process. Blocks of 128 rows are counted from each rank's first row: where that is no multiple of
128, the tail averages other blocks than on one process.

Shapes: N tokens, H hidden, V vocabulary of all ranks, v rows of this rank, R ranks.
Source: Megatron-LM's vocabulary-parallel cross entropy (arXiv 1909.08053), there from logits.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import Backend, choose_backend, expect, refuse_transforms
from .linear_logprob.function import (
    at_temperature,
    check_inputs,
    check_settings,
    compute_dtype,
    needs_backward,
)
from .linear_logprob.operators import (
    OnlyOnce,
    backward_op,
    check_entropy_grad,
    check_targets,
    forward_op,
    kept_of,
)
from .linear_logprob.types import TAIL_EPS, Tail
from .reference import IGNORE_INDEX

_ELSEWHERE = -1
"""A target among another rank's rows."""


class Shard(NamedTuple):
    """This rank's rows of the weight: [start, start + rows)."""

    group: dist.ProcessGroup | None
    start: int
    rows: int


def vocab_parallel_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    tail: Tail = "mean",
    tail_eps: float = TAIL_EPS,
    backend: Backend = "auto",
    return_entropy: bool = False,
    return_log_sum_sq_probs: bool = False,
    return_mean_logits: bool = False,
) -> Any:
    """`linear_logprob` of a weight whose rows are split over the ranks of ``group``.

    All ranks call it together. Each gets all log-probs, the gradient of all of hidden, and that of
    its own rows of weight and bias, provided that all compute the same loss from the log-probs.

    Args:
        hidden: [N, H], the same on all ranks. Dtypes are those of `linear_logprob`.
        weight: [v, H], this rank's rows; they follow those of the ranks before it.
        targets: [N] int64, the same on all ranks: ids in [0, V), of all ranks' rows, or -100.
        group: of the ranks; None for all ranks.
        vocab_start: this rank's first row. If None, the ranks exchange their numbers of rows in
            each call, for which a GPU is waited for.
        bias: [v] of this rank's rows, or None.
        logit_scale, softcap, temperature, tail, tail_eps, backend: see `linear_logprob`.
        return_entropy and so on: also return this one of `Extras`, [N], as `linear_logprob` does.
            ``is_top1`` and statistics cannot be had here.

    Returns:
        [N] log-probs in fp32 (fp64 for fp64 inputs), the same on all ranks; with one or more
        ``return_...`` a tuple of the log-probs and these, in the order of the arguments.

    Raises:
        ValueError: arguments that do not fit. On a CPU also targets outside [0, V), targets that
            differ between ranks, and shards that overlap or leave a gap; a GPU is not waited for,
            and there log-probs are NaN: of such a target, or all of them.
    """
    check_inputs(hidden, weight, targets, bias)
    check_settings(logit_scale, softcap, temperature, tail, tail_eps)
    refuse_transforms("vocab_parallel_linear_logprob", hidden, weight, bias)
    shard = _shard(weight, group, vocab_start)
    dtype = compute_dtype(hidden)
    scales = at_temperature(temperature, logit_scale, softcap)
    settings = (*scales, tail, tail_eps, dtype, choose_backend(backend, hidden, dtype))
    keep = needs_backward(hidden, weight, bias)
    asked = [return_entropy, return_log_sum_sq_probs, return_mean_logits]
    found = _VocabParallel.apply(hidden, weight, bias, targets, shard, settings, keep, asked)
    answers = tuple(x for x in found if x is not None)
    return answers if any(asked) else answers[0]


class _VocabParallel(torch.autograd.Function):
    """log-probs, entropy, log_sum_sq_probs and mean_logits [N]; None for one not ``asked`` for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: Shard,
        settings: tuple[Any, ...],
        keep: bool,
        asked: list[bool],
    ) -> Any:
        local = targets - shard.start
        local = local.where((local >= 0) & (local < shard.rows), _ELSEWHERE)
        local = local.where(targets != IGNORE_INDEX, IGNORE_INDEX)
        some = local.where(local != _ELSEWHERE, 0)  # whose log-prob nobody reads
        own, lse, *kept, entropy, squares, means, _ = forward_op(
            hidden, weight, some, bias, None, *settings, keep, [*asked, False]
        )
        extras = zip((entropy, squares, means), asked, strict=True)
        ranks = _gathered([own, lse, *(x for x, wanted in extras if wanted)], targets, shard)
        logps, lse = _joined(ranks, targets)
        extras = _joined_extras(ranks, lse, targets, asked)
        entropy = lse.new_empty(0) if extras[0] is None else extras[0]
        ctx.save_for_backward(hidden, weight, local, bias, *kept_of((logps, lse, *kept, entropy)))
        ctx.mark_non_differentiable(*(x for x in extras[1:] if x is not None))
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.group = settings, shard.group
        return logps, *extras

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        none = (None,) * 8
        grad, entropy_grad, *_ = grads
        if grad is None and entropy_grad is None:
            return none
        check_entropy_grad(entropy_grad, ctx.settings[2])
        grad = torch.zeros_like(entropy_grad) if grad is None else grad
        needs = list(ctx.needs_input_grad[:3])
        hidden, weight, local, bias, *kept = ctx.saved_tensors
        inputs = (hidden, weight, local, bias)
        with torch.no_grad():
            gradients = backward_op(grad, *inputs, None, *kept, entropy_grad, *ctx.settings, needs)
            if needs[0]:
                dist.all_reduce(gradients[0], group=ctx.group)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [OnlyOnce.apply(gradient, grad, *inputs) for gradient in gradients]
        found = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return *found, *none[3:]


def _shard(weight: Tensor, group: dist.ProcessGroup | None, vocab_start: int | None) -> Shard:
    """This rank's rows; those of the ranks before it are counted where no start is given."""
    ready = dist.is_available() and dist.is_initialized()
    expect(ready, "group", "a process group; call torch.distributed.init_process_group", None)
    rank = dist.get_rank(group)
    expect(rank >= 0, "group", "one with this rank in it", group)
    if vocab_start is None:
        mine = torch.tensor([len(weight)], device=weight.device)
        counts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, mine, group=group)
        vocab_start = int(torch.cat(counts)[:rank].sum())
    fits = isinstance(vocab_start, int) and vocab_start >= 0
    expect(fits, "vocab_start", "this rank's first row, or None", vocab_start)
    return Shard(group, vocab_start, len(weight))


class Ranks(NamedTuple):
    """What all ranks found. values: [R, K, N], logps, lse and extras over each rank's own rows.

    starts, rows: [R], of each. fits: [] bool, whether they follow each other, and all ranks have
    the same targets.
    """

    values: Tensor
    starts: Tensor
    rows: Tensor
    fits: Tensor


def _gathered(found: list[Tensor], targets: Tensor, shard: Shard) -> Ranks:
    """All ranks' ``found``, K tensors [N].

    Also their rows, and a sum of their targets, by which a mistake is noticed; fp32 holds these
    numbers exactly.
    """
    tokens = len(targets)
    mine = found[0].new_empty(len(found), tokens + 2)
    mine[:, :tokens] = torch.stack(found)
    mine[0, tokens], mine[1, tokens] = shard.start, shard.rows
    mine[:, tokens + 1] = targets.sum() % 2**20
    every = mine.new_empty(dist.get_world_size(shard.group), *mine.shape)
    dist.all_gather(list(every), mine, group=shard.group)
    starts, rows, sums = (every[:, i, j].long() for i, j in ((0, -2), (1, -2), (0, -1)))
    fits = (starts == rows.cumsum(0) - rows).all() & (sums == sums[0]).all()
    if targets.device.type == "cpu":
        _check_ranks(starts.tolist(), rows.tolist(), sums.tolist(), targets)
    return Ranks(every[:, :, :tokens], starts, rows, fits)


def _check_ranks(starts: list[int], rows: list[int], sums: list[int], targets: Tensor) -> None:
    """Raise ``ValueError`` on every rank where the ranks do not fit together."""
    *ends, vocabulary = accumulate(rows, initial=0)
    for rank, (start, end) in enumerate(zip(starts, ends, strict=True)):
        before = f"{end} on rank {rank}, as many as the ranks before it hold, or None"
        expect(start == end, "vocab_start", before, start)
    if len(set(sums)) > 1:
        raise ValueError("targets: expected the same on all ranks, got others on some rank")
    check_targets(targets, vocabulary)


def _joined(ranks: Ranks, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and logsumexp [N] over all ranks' rows."""
    starts, ends = ranks.starts[:, None], (ranks.starts + ranks.rows)[:, None]
    held = (targets >= starts) & (targets < ends)  # [R, N], on one rank where all fit
    logps, lses = ranks.values[:, 0], ranks.values[:, 1]
    own = lses.where(held, 0.0).sum(0)
    shift = (lses - own).logsumexp(0)
    logps = logps.where(held, 0.0).sum(0) - shift
    logps = logps.where(held.any(0) & ranks.fits, torch.nan)
    return logps.where(targets != IGNORE_INDEX, 0.0), own + shift


def _joined_extras(
    ranks: Ranks, lse: Tensor, targets: Tensor, asked: list[bool]
) -> list[Tensor | None]:
    """Those of `Extras` over all ranks' rows, as `linear_logprob.extras` joins those of blocks."""
    log_masses = ranks.values[:, 1] - lse
    finite = log_masses.clamp_min(torch.finfo(lse.dtype).min)
    rows = ranks.rows.to(lse.dtype)[:, None]
    join = (
        lambda entropy: (finite.exp() * (entropy - finite)).sum(0),
        lambda squares: (2 * log_masses + squares).logsumexp(0),
        lambda means: (means * rows).sum(0) / rows.sum(),
    )
    values = iter(ranks.values[:, 2:].unbind(1))
    scored = targets != IGNORE_INDEX
    return [
        of_all(next(values)).where(scored, 0.0) if wanted else None
        for of_all, wanted in zip(join, asked, strict=True)
    ]
