"""The auxiliary loss of a mixture of experts, which keeps its router from favouring a few.

Switch Transformers (arXiv 2101.03961), equations 4 to 6, as transformers' families compute it: with
E experts, a weight w_t for each token and the mean over layers and tokens,

    loss = E · Σ_e (Σ_t w_t · [t is sent to e] / Σ w) · (Σ_t w_t · p_te / Σ w)

It is the one term that is no mean over pairs: a product of two means over tokens. It is computed
for each global micro-batch, over all ranks; the step's is the mean over its micro-batches.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RouterBalance:
    """How much of the auxiliary loss a run adds, in training alone.

    Args:
        model: bare.
        setting: the coefficient; None for what the model's config says.

    Raises:
        UserError: a coefficient for a model whose family has no such loss.
    """

    def __init__(self, model: PreTrainedModel, setting: float | None) -> None:
        has = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
        config: Any = model.config.get_text_config()
        own = getattr(config, "router_aux_loss_coef", getattr(config, "aux_loss_coef", 0.0))
        if setting and not has:
            raise UserError(
                f"router_aux_loss_coef: leave it out; {type(model).__name__} has no such loss"
            )
        self.setting = setting
        self.coefficient = float((own if has else 0) if setting is None else setting)

    def inputs(self, batch: Mapping[str, Any], training: bool) -> dict[str, Tensor]:
        """What the model's forward needs besides, to return ``aux_loss``."""
        wanted = training and self.coefficient > 0
        return {"router_weights": token_weights(batch)} if wanted else {}

    def share(self, aux_loss: Tensor, micro_batches: int) -> Tensor:
        """A micro-batch's share of the step's loss []."""
        return self.coefficient * aux_loss / micro_batches

    def check(self, aux_loss: Tensor | None) -> None:
        """Raise ``UserError`` where the loss was asked for, and the model has no experts."""
        if self.setting and aux_loss is None:
            raise UserError("router_aux_loss_coef: leave it out; this model has no experts")


def token_weights(batch: Mapping[str, Any]) -> Tensor:
    """How often each token would occur if every answer had a padded row of its own, [B·T] fp32.

    A prompt that n answers share counts n times. Padding counts 0, and so does a batch of filler
    pairs alone. Nothing waits for the device.
    """
    real = (batch["pair_ids"] >= 0).any()
    segments = batch.get("segment_ids")
    if segments is None:
        return batch["attention_mask"].flatten() * real.float()
    segments, branches = segments.flatten(), batch["branch_ids"].flatten()
    count = segments.new_zeros(segments.numel() + 1, dtype=branches.dtype)
    # Padding, of segment -1, is counted in the last place, which no segment has.
    count = count.scatter_reduce(0, segments.long() % len(count), branches, "amax")
    shared = count[segments.long()].clamp(min=1)
    return torch.where(segments < 0, 0, torch.where(branches == 0, shared, 1)) * real.float()


def balance_loss(router_logits: Sequence[Tensor], weights: Tensor, top_k: int) -> Tensor:
    """The auxiliary loss [] over all ranks' tokens; a collective with several ranks.

    Its value is the same on all ranks, and its gradient this rank's share times their number, since
    the gradients of all ranks are averaged.

    Args:
        router_logits: [B·T, E] of each layer. weights: [B·T]. top_k: experts a token is sent to.
    """
    probs = weights.new_zeros(router_logits[0].shape[-1])
    sent = torch.zeros_like(probs)
    for logits in router_logits:
        each = logits.reshape(len(weights), -1).float().softmax(-1)
        probs = probs + (weights[:, None] * each).sum(0)  # autocast would round a product
        chosen = each.detach().topk(top_k, dim=-1).indices.flatten()
        sent = sent.index_add(0, chosen, weights.repeat_interleave(top_k))
    tokens = len(router_logits) * weights.sum()
    totals = torch.cat([sent, probs.detach(), tokens[None]])
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        dist.all_reduce(totals)
    experts = len(probs)
    sent, all_probs, tokens = totals[:experts], totals[experts:-1], totals[-1].clamp(min=1)
    probs = all_probs + ranks * (probs - probs.detach())
    return experts * (sent * probs).sum() / tokens**2
