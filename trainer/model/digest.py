"""Hashes of a model's weights and config, by which other rooms tell one model from another."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..files import digest
from .adapters import bare_model

# What of a model's config does not change its log-probs.
IRRELEVANT = {
    "_name_or_path", "architectures", "transformers_version", "use_cache", "dtype",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def model_digest(model: nn.Module, main: bool = True) -> str:
    """The hash of a model's weights (names, shapes, dtypes, bytes) and of its config.

    Under ZeRO-3, which brings the weights together one by one, call it on all ranks. Elsewhere
    ``main=False`` spares a rank whose digest nobody reads the work.
    """
    split = _is_split(model)
    if not main and not split:
        return ""
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    weights = _digests(model, list(model.named_parameters()) if split else list(state.items()))
    config = bare_model(model).config.to_dict()
    config = {name: value for name, value in config.items() if name not in IRRELEVANT}
    content = [type(bare_model(model)).__name__, config, weights]
    return digest([json.dumps(content, sort_keys=True, default=str)])


def frozen_digest(model: nn.Module, main: bool = True) -> str:
    """The hash of the weights that do not learn, "" where all learn; call it as `model_digest`."""
    frozen = [(k, p) for k, p in model.named_parameters() if not p.requires_grad]
    if not frozen or (not main and not _is_split(model)):
        return ""
    return digest([json.dumps(_digests(model, frozen), sort_keys=True)])


def _is_split(model: nn.Module) -> bool:
    """Whether ZeRO-3 has taken the weights apart."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _digests(model: nn.Module, tensors: list[tuple[str, Any]]) -> dict[str, str]:
    if _is_split(model):
        return {name: _tensor_digest(tensor) for name, tensor in _gathered(tensors)}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        values = threads.map(_tensor_digest, [tensor for _, tensor in tensors])
        return dict(zip([name for name, _ in tensors], values, strict=True))


def _tensor_digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    values = [plain.view(torch.uint8).numpy().data] if plain.numel() else []
    return digest([f"{plain.dtype} {tuple(tensor.shape)} ", *values])


def _gathered(parameters: list[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    import deepspeed  # pyright: ignore[reportMissingImports] (an extra)

    for name, parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter]):
            yield name, parameter.detach()
