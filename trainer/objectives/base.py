"""The frame every objective fits in.

An objective is one pure function ``terms(pairs, hyperparameters, state) -> Terms`` and one row of
a table in `losses`. ``Objective`` builds the ``Pairs`` it sees, keeps its state, adds
what all objectives share (the SFT term, filler pairs, the mean) and reports what trainers chart.

Shapes: N tokens, P pairs of this rank; sequences are P chosen, then P rejected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.margin_loss.function import sequence_logps
from ..errors import UserError
from .lists import Answers, lists_in, lists_of
from .settings import Hyperparameters
from .state import State, taken_up, to_device
from .terms import (
    ObjectiveOutput,
    ObjectiveSpec,
    Pairs,
    Terms,
    by_edges,
    check_labels,
    chosen_nll,
    terms_of,
    with_labels,
)
from .tokens import length_weighted, pair_weights

# Pairs without ids are ordered by rank, then by place: ids of rank r start at r times this.
IDS_PER_RANK = 2**32


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
        return self.spec.couples_pairs or self.hyperparameters.nll != "answers"

    @property
    def scores_prompts(self) -> bool:
        """Whether calls need the log-probs of prompts too."""
        return self.hyperparameters.nll == "prompt_and_answer"

    @property
    def takes(self) -> tuple[str, ...]:
        """The kinds of data that it trains on, see `ObjectiveSpec`."""
        return ("labelled",) if self.exchanges_answers else self.spec.takes

    @property
    def exchanges_answers(self) -> bool:
        """Whether it needs the log-ratios of answers to other prompts, see `Answers`."""
        chosen = getattr(self.hyperparameters, "kl_estimate", None) == "mismatched"
        return chosen and "labelled" in self.spec.takes

    @property
    def ranks_lists(self) -> bool:
        """Whether it has a loss of all answers to a prompt, and none of a pair."""
        return self.takes == ("scored",)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """[] int64: what a collated batch's losses are averaged over: real pairs, or lists."""
        return lists_in(batch) if self.ranks_lists else (batch["pair_ids"] >= 0).sum()

    @property
    def needs_reference(self) -> bool:
        return self.spec.needs_reference

    @property
    def compares_sums(self) -> bool:
        """Whether ``logps/*`` are sums: with a reference always, for else the means are its own."""
        return self.needs_reference or not getattr(self.hyperparameters, "length_norm", True)

    def __call__(
        self,
        token_logps: Tensor,
        cu_seqlens: Tensor,
        reference: Tensor | None = None,
        pair_ids: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
        log_sum_squares: Tensor | None = None,
        edges: Tensor | None = None,
        weights: Tensor | None = None,
        margins: Tensor | None = None,
        prompt_cu_seqlens: Tensor | None = None,
        prompts: Tensor | None = None,
        answers: Answers | None = None,
    ) -> ObjectiveOutput:
        """Losses of P pairs of S sequences, differentiable in ``token_logps``.

        Args:
            token_logps: [N] floating, the completions of the sequences back to back.
            cu_seqlens: [S + 1] int32 or int64.
            reference: [S] summed logps of the frozen model; reference-free objectives ignore it.
            pair_ids: [P] int64, the order of pairs across ranks; a negative id marks a filler pair,
                whose loss is 0 and which enters no statistic. None: by rank, then by place.
            group: processes whose pairs form one global micro-batch, or None for this one alone.
            log_sum_squares: [N] logarithm of the sum over the vocabulary of the policy's squared
                probabilities where each token stands; for ``use_weighting`` alone.
            edges: [P, 2] int64, each pair's chosen and rejected sequence; pairs may share them.
                None: P chosen sequences, then P rejected, so S is 2P.
            weights: [P] that the pairs' losses are multiplied by; statistics weigh all pairs alike.
            margins: [P] added to the target margins; an objective without one refuses them.
            prompt_cu_seqlens: [U + 2] of the prompts in ``token_logps``, see `PairCollator`; for
                ``nll: prompt_and_answer`` alone.
            prompts: [P] int64, each pair's prompt.
            answers: what the data say of the sequences; listwise objectives need their scores.
        """
        if margins is not None and not self.spec.takes_margins:
            raise UserError(
                f"margin: set margin_from: none, or take another objective; {self.name} has no "
                "target margin to add the data's to (one of your own: takes_margins=True)"
            )
        weighs = self.token_weights or "use_weighting" * self.hyperparameters.use_weighting
        check_labels(self.name, self.takes, answers, self.exchanges_answers, weighs)
        pairs = self._pairs(token_logps, cu_seqlens, reference, pair_ids, group, edges, margins)
        if self.scores_prompts:
            pairs = _with_prompts(pairs, token_logps, prompt_cu_seqlens, prompts)
        if answers is not None and answers.labels is not None:
            pairs = with_labels(pairs, answers, edges)
        elif self.ranks_lists:
            given = (answers, token_logps, cu_seqlens, reference, edges)
            pairs = dataclasses.replace(pairs, lists=lists_of(self.name, *given, pairs.real))
        self._state = to_device(self._state, token_logps.device)
        terms = terms_of(self.name, self.spec, pairs, self.hyperparameters, self._state)
        if self.training and terms.state is not None:
            self._state = terms.state
        if self.hyperparameters.use_weighting:
            if log_sum_squares is None:
                raise UserError("log_sum_squares: give it for each token; use_weighting needs it")
            likely = pair_weights(token_logps, log_sum_squares, cu_seqlens, edges)
            terms = dataclasses.replace(terms, losses=likely * terms.losses)
        return self._output(pairs, terms, weights)

    @property
    def token_weights(self) -> str:
        """How sums weigh their tokens, in words; "" where they weigh all alike."""
        alpha = getattr(self.hyperparameters, "ld_alpha", 1.0)
        return "" if alpha == 1 else f"ld_alpha {alpha:g}"

    def sequence_sums(self, token_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The summed logps [2P] of a model, as this objective compares them with another's."""
        if self.token_weights:
            alpha = self.hyperparameters.ld_alpha  # pyright: ignore[reportAttributeAccessIssue]
            token_logps = length_weighted(token_logps, cu_seqlens, alpha)
        return sequence_logps(token_logps, cu_seqlens)[0]

    def _pairs(
        self,
        token_logps: Tensor,
        cu_seqlens: Tensor,
        reference: Tensor | None,
        pair_ids: Tensor | None,
        group: dist.ProcessGroup | None,
        edges: Tensor | None,
        margins: Tensor | None,
    ) -> Pairs:
        sums, lengths = sequence_logps(token_logps, cu_seqlens)
        if self.needs_reference and reference is None:
            raise UserError(f"reference: {self.name} needs the frozen model's summed logps [S]")
        if reference is not None and reference.shape != lengths.shape:
            raise UserError(
                f"reference: expected shape [{len(lengths)}], one sum per sequence, got "
                f"{list(reference.shape)}"
            )
        if edges is None and len(lengths) % 2:
            count = len(lengths)
            raise UserError(f"edges: give them, [P, 2]; cu_seqlens has {count} sequences, not 2P")
        sums, lengths = by_edges(sums, edges), by_edges(lengths, edges)
        reference = None if reference is None else by_edges(reference, edges)
        count = len(lengths) // 2
        if pair_ids is None:
            first = 0 if group is None else IDS_PER_RANK * dist.get_rank(group)
            pair_ids = torch.arange(first, first + count, device=token_logps.device)
        elif pair_ids.shape != (count,):
            raise UserError(
                f"pair_ids: expected shape [{count}], one id per pair, got {list(pair_ids.shape)}"
            )
        # So that no gradient of a filler, not a number perhaps, gets past its sums.
        real = (pair_ids >= 0).repeat(2)
        sums = torch.where(real, sums, 0.0)
        means = sums / lengths.clamp(min=1)
        if self.token_weights:
            sums = torch.where(real, self.sequence_sums(token_logps, cu_seqlens), 0.0)
        return Pairs(
            sums=sums,
            means=means,
            lengths=lengths,
            reference_sums=None if reference is None else reference.detach().to(sums.dtype),
            ids=pair_ids,
            margins=margins,
            group=group,
            max_pairs_per_rank=self.max_pairs_per_rank,
            training=self.training,
            coupled=self.couples_pairs,
        )

    def _output(self, pairs: Pairs, terms: Terms, weights: Tensor | None) -> ObjectiveOutput:
        losses = terms.losses
        if self.hyperparameters.sft_weight:
            nll = chosen_nll(pairs, self.hyperparameters.nll)
            losses = losses + self.hyperparameters.sft_weight * nll
        if weights is not None:
            losses = losses * weights.to(losses.dtype)
        losses = torch.where(pairs.real, losses, 0.0)
        count = pairs.real.sum() if pairs.lists is None else pairs.lists.counted(pairs.real)
        chosen_sums, rejected_sums = pairs.sums.detach().chunk(2)
        chosen_means, rejected_means = pairs.means.detach().chunk(2)
        chosen_lengths, rejected_lengths = pairs.lengths.chunk(2)
        sums = self.compares_sums
        sides = pairs.real.repeat(2)
        if pairs.labels is not None:
            sides = sides & torch.cat([pairs.labels, ~pairs.labels])
        return ObjectiveOutput(
            loss=losses.sum() / count.clamp(min=1),
            losses=losses,
            count=count,
            chosen_rewards=terms.chosen_rewards.detach(),
            rejected_rewards=terms.rejected_rewards.detach(),
            target_margins=torch.where(pairs.real, terms.target_margins.detach(), 0.0),
            chosen_logps=chosen_sums if sums else chosen_means,
            rejected_logps=rejected_sums if sums else rejected_means,
            chosen_sum_logps=chosen_sums,
            rejected_sum_logps=rejected_sums,
            chosen_mean_logps=chosen_means,
            rejected_mean_logps=rejected_means,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            real=pairs.real,
            sides=sides,
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


def _with_prompts(
    pairs: Pairs, token_logps: Tensor, cu_seqlens: Tensor | None, prompts: Tensor | None
) -> Pairs:
    if cu_seqlens is None or prompts is None:
        raise UserError(
            "prompt_cu_seqlens: give it and prompts, which nll: prompt_and_answer needs "
            "(PairCollator makes them where its scores_prompts is true)"
        )
    sums, lengths = (each[1:][prompts] for each in sequence_logps(token_logps, cu_seqlens))
    sums = torch.where(pairs.real, sums, 0.0)
    return dataclasses.replace(pairs, prompt_sums=sums, prompt_lengths=lengths)
