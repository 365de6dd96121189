"""The head of a model that tensor parallelism has split: transformers' ``tp_plan``.

Each rank has some rows of lm_head's weight, as a DTensor; hidden states are the same on all ranks.
Under FSDP2 the weight is a plain tensor in lm_head's call, so a DTensor there is of this kind.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from ...kernels.vocab_parallel import vocab_parallel_linear_logprob
from ..errors import UserError


def is_sharded(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), DTensor)


def check_sharded(head: Any) -> None:
    """Raise ``UserError`` where the weight is split, and not by rows over one group of ranks."""
    if is_sharded(head) and head.weight.placements != (Shard(0),):
        raise UserError(
            "model: load it without tp_plan, or with a plan that splits lm_head's rows "
            f"(colwise_gather_output); its weight is {head.weight.placements}"
        )


def refuse_sharded(model: Any) -> None:
    """Raise ``UserError`` for a model whose ranks must get the same pairs."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UserError(
            "model: load it without tp_plan; this trainer gives each rank other pairs, and tensor "
            "parallelism needs the same on all. In a loop of your own patch_head takes such a model"
        )


def sharded_scores(
    head: Any, hidden: Tensor, targets: Tensor, figures: bool, settings: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``targets`` [N], and each token's mean logit before any softcap, detached.

    Args:
        figures: whether those of `ScoredTokens` are asked for. settings: of the head.
    """
    if figures:
        raise UserError(
            "figures: leave them out; the head has none of a weight that tp_plan has split"
        )
    weight: DTensor = head.weight
    mesh, vocabulary = weight.device_mesh, len(weight)
    rows = weight.to_local()
    bias = head.bias.to_local() if head.bias is not None else None
    logps = vocab_parallel_linear_logprob(
        hidden,
        rows,
        targets,
        group=mesh.get_group(),
        vocab_start=mesh.get_local_rank() * -(-vocabulary // mesh.size()),  # as torch.chunk cuts
        bias=bias,
        **settings,
    )
    with torch.no_grad():
        mean_logits = hidden.float() @ rows.sum(0, dtype=torch.float32)
        if bias is not None:
            mean_logits += bias.float().sum()
        dist.all_reduce(mean_logits, group=mesh.get_group())
    return logps, mean_logits * (settings["logit_scale"] / vocabulary)
