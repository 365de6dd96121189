"""TR-DPO, arXiv 2404.09656: a reference that follows the policy.

Every ``ref_model_sync_steps`` steps its weights become ``ref_model_mixup_alpha`` times the policy's
plus the rest of its own, in its dtype. They are saved with each checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from ..errors import UserError
from ..model.adapters import bare_model

REFERENCE_FILE = "reference.safetensors"


class SyncedReference(TrainerCallback):
    """Mixes the policy into the frozen ``model`` as the run's settings say."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        policy = dict(bare_model(kwargs["model"]).named_parameters())
        for name, parameter in self.model.named_parameters():
            parameter.lerp_(policy[name].to(parameter.dtype), args.ref_model_mixup_alpha)

    def save(self, folder: str) -> None:
        """Write the weights as they are now into a checkpoint; call it on one rank."""
        weights = {name: p.detach().cpu() for name, p in self.model.named_parameters()}
        save_file(weights, Path(folder) / REFERENCE_FILE)

    @torch.no_grad()
    def load(self, folder: str) -> None:
        """Take up the weights of a checkpoint."""
        path = Path(folder) / REFERENCE_FILE
        if not path.is_file():
            raise UserError(
                f"checkpoint {folder}: it has no {REFERENCE_FILE}, which sync_ref_model needs "
                "to go on; take one of a run with that setting"
            )
        weights = load_file(path)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])
