"""Log-ratios of answers after other prompts than their own, for KTO's estimate of the KL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..objectives.lists import Answers
from ..packing import mismatched_inputs

if TYPE_CHECKING:
    from .model import Reference


def answers_of(
    batch: Mapping[str, Any], policy: nn.Module, reference: Reference | None
) -> Answers | None:
    """What a batch says of its answers, and both models of its mismatched ones, if it has any.

    The two forwards are without gradients, in the batch's own layout.
    """
    answers, other = Answers.of(batch), mismatched_inputs(batch)
    if answers is None or reference is None or not other:
        return answers
    return replace(answers, mismatched=reference.ratios(policy, other))
