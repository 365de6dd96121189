"""The plain ``transformers.Trainer`` without logits: a collator and a loss.

    patch_head(model)
    Trainer(
        model,
        TrainingArguments(..., prediction_loss_only=True),
        data_collator=CompletionCollator(DataCollatorForSeq2Seq(tokenizer)),
        compute_loss_func=token_nll,
        ...
    )

The loss is the Trainer's own: the mean negative log-prob of the labelled tokens of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..trainer.errors import UserError
from ..trainer.model.head import ScoredTokens, patch_head

__all__ = ["CompletionCollator", "patch_head", "token_nll"]


class CompletionCollator:
    """Adds to the batches of any collator what a patched model takes.

    That is ``select`` [N], the flat positions whose hidden states predict labelled tokens, and
    ``targets`` [N], these tokens. ``labels`` [batch, length], -100 where not scored, stay in the
    batch: the Trainer counts a step's tokens by them.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        if "labels" not in batch:
            raise UserError(
                "data_collator: give CompletionCollator one that makes labels, as "
                f"DataCollatorForSeq2Seq does; the batch has {', '.join(batch)}"
            )
        labels = batch["labels"]
        following = labels[:, 1:]
        row, column = (following != -100).nonzero(as_tuple=True)
        batch["select"] = row * labels.shape[1] + column
        batch["targets"] = following[row, column]
        return batch


def token_nll(
    outputs: ScoredTokens, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The Trainer's ``compute_loss_func``: the sum over the tokens, divided by the step's number.

    Without a number, as in evaluation, by that of the batch.
    """
    logps = getattr(outputs, "token_logps", None)
    if logps is None:
        raise UserError(
            "model: call patch_head(model) before the Trainer, and make its batches by "
            f"CompletionCollator; the model returned {type(outputs).__name__} without token_logps"
        )
    count = max(len(logps), 1) if num_items_in_batch is None else num_items_in_batch
    return -logps.sum() / count
