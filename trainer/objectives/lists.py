"""What data say of single answers, and the lists that the answers to one prompt are.

Shapes: S sequences (answers), P pairs, which are edges between answers to the same prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.margin_loss.function import sequence_logps
from ..errors import UserError


@dataclass(frozen=True)
class Answers:
    """What the data say of S answers, beside their tokens."""

    tree_ids: Tensor  # [S] int64, equal for answers to one prompt
    scores: Tensor | None = None  # [S], higher for a better answer
    labels: Tensor | None = None  # [S] bool, desirable
    mismatched: Tensor | None = None
    """[P] summed logps of policy minus reference, of every prompt's neighbour's answer after it."""

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Answers | None:
        """Those of a collated batch; None where it says nothing of single answers."""
        if "tree_ids" not in batch:
            return None
        return cls(batch["tree_ids"], batch.get("scores"), batch.get("labels"))


@dataclass(frozen=True)
class Lists:
    """The answers to every prompt as a list. All but ``edges`` is [S], or [S, S] of two answers.

    Answers to other prompts are masked, never multiplied by 0, so that one answer whose number is
    not finite spoils its own list alone. Nothing waits for the device.
    """

    sums: Tensor  # differentiable, as in `Pairs`
    means: Tensor
    lengths: Tensor
    reference_sums: Tensor | None
    scores: Tensor
    together: Tensor  # [S, S] bool: both answer one prompt
    edges: Tensor  # [P, 2]

    @property
    def better(self) -> Tensor:
        """[S, S] bool: the first answer has the higher score of its list."""
        return self.together & (apart(self.scores) > 0)

    @property
    def best(self) -> Tensor:
        """[S] bool: no answer of its list has a higher score."""
        return ~self.better.any(0)

    @property
    def count(self) -> Tensor:
        """[S] answers of its list."""
        return self.together.sum(1)

    def total(self, values: Tensor) -> Tensor:
        """[S] the sum of ``values`` [S] over each answer's list."""
        return torch.where(self.together, values, 0.0).sum(1)

    def log_softmax(self, values: Tensor) -> Tensor:
        """[S] of every list."""
        return values - masked_logsumexp(values, self.together)

    def nll_of_best(self) -> Tensor:
        """[S] terms whose sum over a list is minus the mean logp of its best answer.

        Of several that are best alike, their mean.
        """
        best = self.best.to(self.means.dtype)
        return torch.where(self.best, -self.means / self.total(best), 0.0)

    def dealt(self, values: Tensor) -> Tensor:
        """[P] the sums of ``values`` [S] over lists, in equal shares for the pairs of each."""
        return self.total(values)[self.edges[:, 0]] / self._pairs_alike

    def counted(self, real: Tensor) -> Tensor:
        """[] lists of pairs [P] that are ``real``."""
        return count_lists(real, self._pairs_alike)

    @property
    def _pairs_alike(self) -> Tensor:
        """[P] pairs that share the list of each."""
        first = self.edges[:, 0]
        return self.together[first][:, first].sum(1)


def lists_in(batch: Mapping[str, Any]) -> Tensor:
    """[] lists of a collated batch, without those of filler pairs."""
    tree = batch["tree_ids"][batch["edges"][:, 0]]
    return count_lists(batch["pair_ids"] >= 0, (tree[:, None] == tree).sum(1))


def count_lists(real: Tensor, pairs_alike: Tensor) -> Tensor:
    """[] int64: lists of pairs that are ``real`` [P], of as many pairs each."""
    return torch.where(real, 1 / pairs_alike.double(), 0.0).sum().round().long()


def lists_of(
    name: str,
    answers: Answers | None,
    token_logps: Tensor,
    cu_seqlens: Tensor,
    reference: Tensor | None,
    edges: Tensor | None,
    real: Tensor,
) -> Lists:
    """The lists of S answers, those of filler pairs with sums of 0.

    Args:
        name: the objective's.
        token_logps, cu_seqlens, reference, edges: as `Objective` takes them.
        real: [P] bool, not a filler.

    Raises:
        UserError: the data give no scores.
    """
    if answers is None or answers.scores is None:
        raise UserError(
            f"scores: give the scores of all answers to a prompt (columns completions and scores, "
            f"or score_chosen and score_rejected), which {name} ranks them by; or take an "
            "objective of pairs"
        )
    sums, lengths = sequence_logps(token_logps, cu_seqlens)
    if edges is None:
        edges = torch.arange(len(sums), device=sums.device).reshape(2, -1).T
    uses = torch.zeros_like(lengths, dtype=torch.int64)
    uses = uses.index_add(0, edges.reshape(-1), real.long().repeat_interleave(2))
    # So that no number or gradient of a filler, not finite perhaps, gets into a list.
    sums = torch.where(uses > 0, sums, 0.0)
    if reference is not None:
        reference = torch.where(uses > 0, reference.detach().to(sums.dtype), 0.0)
    return Lists(
        sums=sums,
        means=sums / lengths.clamp(min=1),
        lengths=lengths,
        reference_sums=reference,
        scores=answers.scores.to(sums.dtype),
        together=answers.tree_ids[:, None] == answers.tree_ids,
        edges=edges,
    )


def apart(values: Tensor) -> Tensor:
    """[S, S] each value of [S] minus each other one."""
    return values[:, None] - values[None, :]


def masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """[S] over the values [S] that each row of ``mask`` [S, S] has, one at least."""
    return values.expand_as(mask).masked_fill(~mask, -torch.inf).logsumexp(1)
