"""What the head's backends are called with and return: plain data, the same for torch and Triton.

Shapes: N tokens, H hidden, V vocabulary, B blocks of ``routing.BLOCK`` vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Tail = Literal["mean", "exact", "drop"]
TAILS: tuple[Tail, ...] = get_args(Tail)
TAIL_EPS = 2**-12
"""The op's default, chosen by the gradient: its relative error is about 1e-3 on real states.
``TRAINING_TAIL_EPS`` is what to train with."""
TRAINING_TAIL_EPS = 2**-17
"""The trainer's default, chosen by what AdamW makes of the gradient: a power of two with which the
weights end within 3% of the update from where the exact gradient takes them (bench/head/adamw.py).
AdamW divides by a gradient's own size, so the direction of rare tokens' rows counts, however small
they are, and the norm of the error does not show it."""


class HeadCall(NamedTuple):
    """One call's inputs. hidden: [N, H]. weight: [V, H]. bias: [V] or None.

    compute_dtype: what products round their inputs to, as `F.linear` would under autocast.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    compute_dtype: torch.dtype


class Asked(NamedTuple):
    """Which `Extras` a call asks for."""

    entropy: bool = False
    log_sum_sq_probs: bool = False
    mean_logits: bool = False
    is_top1: bool = False


class Extras(NamedTuple):
    """Facts about each token's distribution p, [N] each; None where not asked for.

    log_sum_sq_probs: ``log sum_v p_v^2``. mean_logits: over the vocabulary, after scale, softcap
    and temperature. is_top1: bool, whether greedy decoding would take the target, that is, no token
    has a larger logit and none before it the same. The entropy alone has a gradient.
    """

    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


class Saved(NamedTuple):
    """What forward keeps. targets, logps, lse: [N]. partial_lse: [B, N]. profile: [V] or empty.

    ``targets`` are in [0, V), or in backward -1 for one among another rank's rows; the others in
    fp32 (fp64 for fp64 inputs). tops: [B, N] int32, or [0, N] where nothing reads them: of each
    block's mass the share that its largest element has, as the bits of an fp32 number whose low 7
    bits hold the element's column in the block instead. Not finite where partial_lse is not.
    extras: of calls that ask for some; backward reads none.
    """

    targets: Tensor
    logps: Tensor
    lse: Tensor
    partial_lse: Tensor
    profile: Tensor
    tops: Tensor
    extras: Extras | None = None


class EntropyGrad(NamedTuple):
    """values: [N], the tokens' entropies. grad: [N] of them, 0 where not scored."""

    values: Tensor
    grad: Tensor

    def scaled(self, scale: float) -> EntropyGrad:
        return EntropyGrad(self.values, self.grad * scale)

    def at(self, order: Tensor) -> EntropyGrad:
        """Of the tokens [N] in ``order``."""
        return EntropyGrad(self.values[order], self.grad[order])


class GradRequest(NamedTuple):
    """What backward is asked for.

    grad: [N] of the log-probs, 0 where not scored. scored: [N] bool. tail_eps: 0 computes every
    pair. hidden, weight, bias: which of them need a gradient. entropy: None where the loss has
    none; with one, ``tail_eps`` is 0.
    """

    grad: Tensor
    scored: Tensor
    tail_eps: float
    hidden: bool
    weight: bool
    bias: bool
    entropy: EntropyGrad | None = None


class Gradients(NamedTuple):
    """Of hidden [N, H], weight [V, H] and bias [V]; None for those not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class HeadStats:
    """What routing did, as device scalars; NaN until backward has run.

    active_fraction: pairs (token, vocabulary block) recomputed, of all. averaged_mass_mean,
    averaged_mass_max: probability per token left to the tail. dense: 1 if every pair was computed.
    All of scored tokens (no target of -100).
    """

    values: Tensor

    @property
    def active_fraction(self) -> Tensor:
        return self.values[0]

    @property
    def averaged_mass_mean(self) -> Tensor:
        return self.values[1]

    @property
    def averaged_mass_max(self) -> Tensor:
        return self.values[2]

    @property
    def dense(self) -> Tensor:
        return self.values[3]
