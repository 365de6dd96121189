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
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..trainer import head
from ..trainer.errors import UserError
from ..trainer.head import ScoredTokens
from ..trainer.model.adapters import bare_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..trainer.model.head import Scoring

__all__ = ["CompletionCollator", "patch_head", "token_nll"]


def patch_head(model: PreTrainedModel, **settings: Any) -> Scoring:
    """`widemargin.trainer.head.patch_head` for `token_nll`, with the same settings.

    Raises:
        UserError: what that function raises, or the model's own loss has another term.
    """
    config: Any = getattr(bare_model(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise UserError(
            "model: set output_router_logits to false in its config; token_nll does not add the "
            "auxiliary loss that balances the experts, and the model's own loss has it"
        )
    return head.patch_head(model, **settings)


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
