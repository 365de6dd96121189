"""Weights that an update has overflowed, which must not be saved."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError


def check_weights(trainer: Any) -> None:
    """Raise where an update has overflowed the weights, on all ranks; a collective with several.

    An update can do so by a finite gradient: in fp16, or with ``adam_epsilon: 0``.
    """
    model: Any = trainer.model
    tensors = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    bad = torch.stack([~torch.isfinite(t).all() for t in tensors if t.numel()] or [torch.tensor(0)])
    any_bad = bad.any().to(trainer.args.device, torch.int32)
    if trainer.args.world_size > 1:
        dist.all_reduce(any_bad, op=dist.ReduceOp.MAX)
    if any_bad.item():
        last = trainer.last_checkpoint()
        raise UserError(
            f"Lower learning_rate, keep weights in fp32 (dtype: float32), or raise adam_epsilon: "
            f"after step {trainer.state.global_step} the model has weights that are not finite, "
            f"and they are not saved. The last complete checkpoint is {last or 'none'}"
        )
