"""Placing a frozen model: on the rank's device, or split over ranks as the policy is."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from ..errors import UserError
from .adapters import bare_model

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments


def place_frozen(model: Any, accelerator: Accelerator, args: TrainingArguments) -> Any:
    """The model ready for forward passes without gradients, on all ranks.

    Under FSDP2 and ZeRO-3 its weights are split as the policy's are; otherwise every rank has all
    of them; DDP, which exchanges gradients, is left out.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError(
                "fsdp_version: a reference model needs version 2; set it, or train without FSDP"
            )
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        if getattr(model, "is_quantized", False):  # placed when it was loaded
            return model
        return model.to(args.device)
    config = _inference_config(accelerator, bare_model(model).config.get_text_config().hidden_size)
    if config["zero_optimization"]["stage"] == 3:
        import deepspeed  # pyright: ignore[reportMissingImports] (an extra)

        engine = deepspeed.initialize(model=model, config=config)[0]
        engine.eval()
        return engine
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return model.to(args.device, dtypes.get(accelerator.mixed_precision))


def _inference_config(accelerator: Accelerator, hidden_size: int) -> dict[str, Any]:
    """The run's DeepSpeed settings without an optimizer, and buffers sized as transformers does."""
    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)  # pyright: ignore
    config.pop("optimizer", None)
    config.pop("scheduler", None)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    if zero["stage"] == 3:
        zero |= {
            "reduce_bucket_size": hidden_size * hidden_size,
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
        }
    return config
