"""The frame every objective fits in.

An objective is one pure function ``terms(pairs, hyperparameters, state) -> Terms`` and one row of
a table in `losses`. ``Objective`` builds the ``Pairs`` it sees, keeps its state, adds
what all objectives share (the SFT term, filler pairs, the mean) and reports what trainers chart.

Shapes: N tokens, P pairs of this rank; sequences are P chosen, then P rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.margin_loss.function import Kind, pair_losses, sequence_logps
from ..errors import UserError
from .gather import GlobalPairs, gather_pairs
from .settings import Hyperparameters
from .state import State, taken_up, to_device

# Pairs without ids are ordered by rank, then by place: ids of rank r start at r times this.
IDS_PER_RANK = 2**32


@dataclass(frozen=True)
class Pairs:
    """What an objective sees of a micro-batch. Sums and means are differentiable."""

    sums: Tensor  # [2P] fp32, or fp64 for fp64; 0 for a filler pair
    means: Tensor  # [2P] per token; 0 for an empty completion or a filler pair
    lengths: Tensor  # [2P] int
    reference_sums: Tensor | None  # [2P] of the frozen model
    ids: Tensor  # [P] int64, negative for a filler pair
    group: dist.ProcessGroup | None
    max_pairs_per_rank: int | None
    training: bool

    @property
    def real(self) -> Tensor:
        """[P] bool: not a filler."""
        return self.ids >= 0

    def gather(self, values: Tensor) -> GlobalPairs:
        """``values`` [P] or [P, C] of all ranks' pairs: one collective, so call it on all ranks."""
        columns = values if values.dim() == 2 else values[:, None]
        return gather_pairs(columns, self.ids, self.group, self.max_pairs_per_rank)


@dataclass(frozen=True)
class Terms:
    """What an objective's function returns, per pair [P]."""

    losses: Tensor  # differentiable
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    target_margins: Tensor
    state: State | None = None  # the next state; None: unchanged. Kept in training only


@dataclass(frozen=True)
class ObjectiveSpec:
    """One row of the table of objectives."""

    formula: str
    hyperparameters: type[Hyperparameters]
    terms: Callable[[Pairs, Any, State], Terms]
    initial_state: Callable[[Any], State] | None = None
    couples_pairs: bool = False  # needs one global micro-batch at a time
    needs_reference: bool = False


@dataclass(frozen=True)
class ObjectiveOutput:
    """Losses of one call. All but ``loss`` and ``losses`` are detached; [P] unless noted."""

    loss: Tensor  # [] mean of losses over this rank's real pairs; 0 when it has none
    losses: Tensor  # 0 for a filler pair
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    target_margins: Tensor  # 0 for a filler pair
    chosen_sum_logps: Tensor
    rejected_sum_logps: Tensor
    chosen_mean_logps: Tensor
    rejected_mean_logps: Tensor
    chosen_lengths: Tensor  # int
    rejected_lengths: Tensor  # int
    real: Tensor  # bool, False for a filler pair


def constant_margins(pairs: Pairs, margin: float) -> Tensor:
    """[P] of one target margin."""
    return torch.full_like(pairs.ids, margin, dtype=pairs.sums.dtype)


def chosen_nll(pairs: Pairs, counted: str) -> Tensor:
    """[P] minus the chosen answers' log-probs, each answer's mean (``counted`` "answers").

    For "tokens" scaled so that their mean over the global micro-batch is that over its tokens: a
    collective, so call it on all ranks.
    """
    nll = -pairs.means.chunk(2)[0]
    if counted == "answers":
        return nll
    lengths = pairs.lengths.chunk(2)[0].to(nll.dtype)
    return nll * lengths / pairs.gather(lengths).mean().clamp(min=1).to(nll.dtype)


def margin_terms(
    pairs: Pairs,
    beta: float,
    target_margins: Tensor,
    *,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
    state: State | None = None,
) -> Terms:
    """Terms of a reference-free objective: the loss of ``margin_loss`` with these target margins.

    From the means, which `Objective` has: the fused op would sum the tokens a second time.
    """
    target_margins = target_margins.to(pairs.sums.dtype)
    chosen, rejected = pairs.means.chunk(2)
    x = beta * (chosen - rejected) - target_margins.detach()
    losses = pair_losses(x, kind, label_smoothing)
    return Terms(losses, beta * chosen, beta * rejected, target_margins, state)


class Objective:
    """A preference objective with its hyperparameters and running state.

    Attributes:
        name, spec, hyperparameters: what it is; none of them changes.
        max_pairs_per_rank: most pairs any rank passes in one call, for padding the all-gather.
            None exchanges sizes first, which waits for the device.
        training: whether calls update the state.
    """

    def __init__(self, name: str, spec: ObjectiveSpec, hyperparameters: Hyperparameters) -> None:
        self.name = name
        self.spec = spec
        self.hyperparameters = hyperparameters
        self.max_pairs_per_rank: int | None = None
        self.training = True
        self._state: State = spec.initial_state(hyperparameters) if spec.initial_state else {}

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the global micro-batch."""
        return self.spec.couples_pairs or self.hyperparameters.nll == "tokens"

    @property
    def needs_reference(self) -> bool:
        return self.spec.needs_reference

    def __call__(
        self,
        token_logps: Tensor,
        cu_seqlens: Tensor,
        reference: Tensor | None = None,
        pair_ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> ObjectiveOutput:
        """Losses of P pairs, differentiable in ``token_logps``.

        Args:
            token_logps: [N] floating, P chosen completions back to back, then P rejected.
            cu_seqlens: [2P + 1] int32 or int64.
            reference: [2P] summed logps of the frozen model; reference-free objectives ignore it.
            pair_ids: [P] int64, the order of pairs across ranks; a negative id marks a filler pair,
                whose loss is 0 and which enters no statistic. None: by rank, then by place.
            group: processes whose pairs form one global micro-batch, or None for this one alone.
        """
        pairs = self._pairs(token_logps, cu_seqlens, reference, pair_ids, group)
        self._state = to_device(self._state, token_logps.device)
        terms = self.spec.terms(pairs, self.hyperparameters, self._state)
        if self.training and terms.state is not None:
            self._state = terms.state
        return self._output(pairs, terms)

    def _pairs(
        self,
        token_logps: Tensor,
        cu_seqlens: Tensor,
        reference: Tensor | None,
        pair_ids: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Pairs:
        sums, lengths = sequence_logps(token_logps, cu_seqlens)
        count = len(lengths) // 2
        if self.needs_reference and reference is None:
            raise UserError(f"reference: {self.name} needs the frozen model's summed logps [2P]")
        if reference is not None and reference.shape != lengths.shape:
            raise UserError(
                f"reference: expected shape [{2 * count}], one sum per sequence, got "
                f"{list(reference.shape)}"
            )
        if pair_ids is None:
            first = 0 if group is None else IDS_PER_RANK * dist.get_rank(group)
            pair_ids = torch.arange(first, first + count, device=token_logps.device)
        elif pair_ids.shape != (count,):
            raise UserError(
                f"pair_ids: expected shape [{count}], one id per pair, got {list(pair_ids.shape)}"
            )
        # So that no gradient of a filler, not a number perhaps, gets past its sums.
        sums = torch.where((pair_ids >= 0).repeat(2), sums, 0.0)
        return Pairs(
            sums=sums,
            means=sums / lengths.clamp(min=1),
            lengths=lengths,
            reference_sums=None if reference is None else reference.detach().to(sums.dtype),
            ids=pair_ids,
            group=group,
            max_pairs_per_rank=self.max_pairs_per_rank,
            training=self.training,
        )

    def _output(self, pairs: Pairs, terms: Terms) -> ObjectiveOutput:
        losses = terms.losses
        if self.hyperparameters.sft_weight:
            nll = chosen_nll(pairs, self.hyperparameters.nll)
            losses = losses + self.hyperparameters.sft_weight * nll
        losses = torch.where(pairs.real, losses, 0.0)
        chosen_sums, rejected_sums = pairs.sums.detach().chunk(2)
        chosen_means, rejected_means = pairs.means.detach().chunk(2)
        chosen_lengths, rejected_lengths = pairs.lengths.chunk(2)
        return ObjectiveOutput(
            loss=losses.sum() / pairs.real.sum().clamp(min=1),
            losses=losses,
            chosen_rewards=terms.chosen_rewards.detach(),
            rejected_rewards=terms.rejected_rewards.detach(),
            target_margins=torch.where(pairs.real, terms.target_margins.detach(), 0.0),
            chosen_sum_logps=chosen_sums,
            rejected_sum_logps=rejected_sums,
            chosen_mean_logps=chosen_means,
            rejected_mean_logps=rejected_means,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            real=pairs.real,
        )

    def train(self, mode: bool = True) -> Objective:
        """Let calls update the state (``mode=False``: as ``eval()``)."""
        self.training = mode
        return self

    def eval(self) -> Objective:
        """Let calls use the state without changing it."""
        return self.train(False)

    def state_dict(self) -> State:
        """A copy of the state: tensors only, under ``<objective>.<name>``; empty without state."""
        return {f"{self.name}.{key}": value.clone() for key, value in self._state.items()}

    def load_state_dict(self, state_dict: State) -> None:
        """Take up a state saved by the same objective; anything else is a UserError."""
        self._state = taken_up(self.name, self._state, state_dict)

    def __repr__(self) -> str:
        return f"Objective({self.name!r}, {self.hyperparameters})"
