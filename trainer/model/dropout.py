"""Dropout: every probability set to zero, and a proof that none is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from .adapters import bare_model, without_adapter

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

COMPARED_TOKENS = 16


def disable_dropout(model: nn.Module) -> None:
    """Set the probability of every dropout to zero, layers and functional ones alike.

    Layers keep it as ``p``. Families that call the function keep it in a number of their own, under
    a name with "drop" in it: ``dropout``, ``attn_dropout``, ``attention_dropout``, ``layerdrop``.
    Some (Persimmon, ProphetNet) read the config in every forward, so its numbers become zero too,
    and are saved so with the model.
    """
    from torch.nn.modules.dropout import _DropoutNd

    modules: Any = model.modules()
    configs: Any = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name.lower():
                setattr(module, name, 0.0)


@torch.no_grad()
def check_no_dropout(model: PreTrainedModel) -> None:
    """Raise ``UserError`` where two forwards in training mode differ, adapters left out.

    It needs weights that are not split over ranks, and leaves the random numbers as they were.
    """
    bare: Any = bare_model(model)
    count = bare.config.get_text_config().vocab_size
    ids = torch.arange(1, 1 + COMPARED_TOKENS, device=bare.device)[None] % count
    was_training = model.training
    model.train()
    devices = [bare.device] if bare.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), without_adapter(model):
            first, second = (bare(input_ids=ids, use_cache=False).logits for _ in range(2))
    finally:
        model.train(was_training)
    apart = (first - second).abs().max().item()
    if apart <= 1e-3 * first.abs().max().clamp_min(1.0).item():  # rounding of atomic sums
        return
    named = [name for name, p in vars(bare.config.get_text_config()).items() if _is_on(name, p)]
    settings = f" ({', '.join(named)})" if named else ""
    raise UserError(
        f"disable_dropout: set the dropout in the model's config to 0{settings}, or set "
        f"disable_dropout: false; {type(bare).__name__} is still random in training mode, where "
        f"two forwards differ by {apart:.2g}"
    )


def _is_on(name: str, value: object) -> bool:
    return ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0
