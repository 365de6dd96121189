"""What a loss sees of a micro-batch, what it returns, and what all losses share.

Shapes: N tokens, P pairs of this rank; sequences are P chosen, then P rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.margin_loss.function import Kind, pair_losses
from ..errors import UserError
from .gather import GlobalPairs, gather_pairs
from .lists import Answers, Lists
from .settings import Hyperparameters
from .state import State, check_state


@dataclass(frozen=True)
class Pairs:
    """What an objective sees of a micro-batch. Sums and means are differentiable."""

    sums: Tensor  # [2P] fp32, or fp64 for fp64; 0 for a filler pair. Weighted by ``ld_alpha``
    means: Tensor  # [2P] per token; 0 for an empty completion or a filler pair
    lengths: Tensor  # [2P] int
    reference_sums: Tensor | None  # [2P] of the frozen model
    ids: Tensor  # [P] int64, negative for a filler pair
    margins: Tensor | None  # [P] that the data add to the target margins
    group: dist.ProcessGroup | None
    max_pairs_per_rank: int | None
    training: bool
    coupled: bool  # whether these are all pairs of the global micro-batch, with those of ``group``
    prompt_sums: Tensor | None = None  # [P], where likelihood terms count prompts; 0 for a filler
    prompt_lengths: Tensor | None = None  # [P] int
    lists: Lists | None = None  # for listwise objectives, of the answers that the pairs join
    labels: Tensor | None = None  # [P] bool: desirable, where both sides are one single answer
    mismatched: Tensor | None = None  # [P] log-ratios of answers to other prompts

    @property
    def real(self) -> Tensor:
        """[P] bool: not a filler."""
        return self.ids >= 0

    @cached_property
    def likelihood_tokens(self) -> Tensor:
        """[] mean tokens that a likelihood term counts of a pair of the global micro-batch, or 1.

        A collective the first time, so ask for it on all ranks.
        """
        lengths = self.lengths.chunk(2)[0]
        lengths = lengths if self.prompt_lengths is None else lengths + self.prompt_lengths
        return self.gather(lengths).mean().clamp(min=1).to(self.means.dtype)

    def widened(self, target_margins: Tensor) -> Tensor:
        """Target margins [P] with those of the data added."""
        target_margins = target_margins.to(self.sums.dtype)
        return target_margins if self.margins is None else target_margins + self.margins

    def gather(self, values: Tensor) -> GlobalPairs:
        """``values`` [P] or [P, C] of all ranks' pairs: one collective, so call it on all ranks."""
        if not self.coupled:
            raise UserError(
                "pairs.gather: set couples_pairs=True in the objective's row; without it each rank "
                "has its own pairs alone"
            )
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


def terms_of(name: str, spec: ObjectiveSpec, pairs: Pairs, hp: Any, state: State) -> Terms:
    """What the function of the objective ``name`` returns; its state without a graph.

    Raises:
        UserError: it is not one number a pair, or does not depend on the policy, or the state is
            not laid out as ``state`` is; or the function changes what it is given.
    """
    before = _versions(pairs)
    terms = spec.terms(pairs, hp, state)
    after = _versions(pairs)
    if changed := next((key for key in before if before[key] != after[key]), None):
        raise UserError(
            f"objective {name!r}: it changes pairs.{changed} in place; metrics read it too, so "
            f"make a new tensor, such as 2 * pairs.{changed}"
        )
    if not isinstance(terms, Terms):
        raise UserError(f"objective {name!r}: return Terms; got {type(terms).__name__}")
    shape, policy = pairs.ids.shape, pairs.sums
    for field in ("losses", "chosen_rewards", "rejected_rewards", "target_margins"):
        value = getattr(terms, field)
        if not isinstance(value, Tensor) or value.shape != shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"objective {name!r}: return {field} of shape {list(shape)}, one number a pair; "
                f"got {got}"
            )
    if policy.requires_grad and torch.is_grad_enabled() and not terms.losses.requires_grad:
        raise UserError(
            f"objective {name!r}: compute losses from pairs.sums or pairs.means with their "
            "gradient; they are detached"
        )
    if terms.state is None:
        return terms
    check_state(name, state, terms.state, "return one laid out as initial_state makes it")
    return replace(terms, state={key: value.detach() for key, value in terms.state.items()})


def _versions(pairs: Pairs) -> dict[str, int]:
    """How often each tensor of the pairs was changed in place, views of it included."""
    tensors = {key: value for key, value in vars(pairs).items() if isinstance(value, Tensor)}
    return {key: each._version for key, each in tensors.items() if not each.is_inference()}


@dataclass(frozen=True)
class ObjectiveSpec:
    """One row of the table of objectives."""

    formula: str
    hyperparameters: type[Hyperparameters]
    terms: Callable[[Pairs, Any, State], Terms]
    initial_state: Callable[[Any], State] | None = None
    couples_pairs: bool = False  # needs one global micro-batch at a time
    needs_reference: bool = False
    takes_margins: bool = False  # adds the data's margins to its target margins
    takes: tuple[str, ...] = ("pairs",)  # kinds of data: also "scored" lists, "labelled" answers

    def __post_init__(self) -> None:
        kind = self.hyperparameters
        if any(isinstance(value, Field) for value in vars(kind).values()):
            raise TypeError(f"{kind.__name__}: decorate it with @dataclass(frozen=True)")
        for field in fields(kind):
            if "help" not in field.metadata:
                raise TypeError(
                    f"{kind.__name__}.{field.name}: declare it as setting(default, help)"
                )


@dataclass(frozen=True)
class ObjectiveOutput:
    """Losses of one call. All but ``loss`` and ``losses`` are detached; [P] unless noted."""

    loss: Tensor  # [] sum of losses over ``count``; 0 when this rank has none
    losses: Tensor  # 0 for a filler pair
    count: Tensor  # [] this rank's real pairs, or its lists where they are what has a loss
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    target_margins: Tensor  # 0 for a filler pair
    chosen_logps: Tensor  # sums, or means where the objective takes those without a reference
    rejected_logps: Tensor
    chosen_sum_logps: Tensor
    rejected_sum_logps: Tensor
    chosen_mean_logps: Tensor
    rejected_mean_logps: Tensor
    chosen_lengths: Tensor  # int
    rejected_lengths: Tensor  # int
    real: Tensor  # bool, False for a filler pair
    sides: Tensor  # [2P] bool, chosen and then rejected: a single answer has one of the two


def by_edges(values: Tensor, edges: Tensor | None) -> Tensor:
    """``values`` [S] of sequences as those of pairs [2P]: P chosen ones, then P rejected."""
    return values if edges is None else values[edges.T.reshape(-1)]


def check_labels(
    name: str, takes: tuple[str, ...], answers: Answers | None, exchanges: bool, weighs: str
) -> None:
    """Raise ``UserError`` where an objective gets labels that it does not take, or lacks some.

    Args:
        name, takes: the objective's, see `ObjectiveSpec`.
        exchanges: whether it needs mismatched answers.
        weighs: the setting by which it weighs an answer by the other one of its pair, or "".
    """
    labelled = answers is not None and answers.labels is not None
    if labelled and "labelled" not in takes:
        raise UserError(f"labels: take kto or apo-zero-unpaired; {name} needs pairs")
    if not labelled and takes == ("labelled",):
        raise UserError(f"labels: give one for every answer, and edges; {name} needs them")
    if exchanges and (answers is None or answers.mismatched is None):
        raise UserError("mismatched: give the log-ratios of answers to other prompts")
    if labelled and weighs:
        raise UserError(
            f"{weighs}: leave it out; it weighs an answer by the other answer of its pair"
        )


def with_labels(pairs: Pairs, answers: Answers, edges: Tensor | None) -> Pairs:
    """The pairs, each of which is one single answer, with its label; ``edges`` [P, 2]."""
    if edges is None or answers.labels is None:
        raise UserError("edges: give them with labels, each answer's to itself")
    return replace(pairs, labels=answers.labels[edges[:, 0]], mismatched=answers.mismatched)


def constant_margins(pairs: Pairs, margin: float) -> Tensor:
    """[P] of one target margin."""
    return torch.full_like(pairs.ids, margin, dtype=pairs.sums.dtype)


def chosen_nll(pairs: Pairs, counted: str) -> Tensor:
    """[P] minus the chosen answers' log-probs, each answer's mean (``counted`` "answers").

    Of a list its best answer's, in equal shares for its pairs. For "tokens" scaled so that their
    mean over the global micro-batch is that over its tokens, and for "prompt_and_answer" with those
    of the prompts: a collective, so call it on all ranks.
    """
    if pairs.lists is not None:
        return pairs.lists.dealt(pairs.lists.nll_of_best())
    nll = -pairs.means.chunk(2)[0]
    if pairs.labels is not None:
        if counted != "answers":
            raise UserError("nll: leave it at answers for single answers with labels")
        nll = torch.where(pairs.labels, nll, 0.0)
    if counted == "answers":
        return nll
    total = nll * pairs.lengths.chunk(2)[0].to(nll.dtype)
    if pairs.prompt_sums is not None:
        total = total - pairs.prompt_sums
    return total / pairs.likelihood_tokens


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
    target_margins = pairs.widened(target_margins)
    chosen, rejected = pairs.means.chunk(2)
    x = beta * (chosen - rejected) - target_margins.detach()
    losses = pair_losses(x, kind, label_smoothing)
    return Terms(losses, beta * chosen, beta * rejected, target_margins, state)
