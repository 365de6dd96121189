"""Both ranks of models that tensor parallelism has split, each against the model of one process.

    torchrun --nproc_per_node=2 -m tests.support.tensor_parallel_ranks FOLDER

``FOLDER`` has the models; every rank writes ``FOLDER/RANK.json``: errors by model, what was
written, and messages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from widemargin.trainer import PreferenceTrainer
from widemargin.trainer.errors import UserError
from widemargin.trainer.head import check_head, patch_head

from tests.support.tiny_models import tiny_config, tiny_pairs

TOKENS = torch.arange(3, 43).view(2, 20)
SELECT = torch.tensor([2, 3, 4, 17, 25, 26, 38])
TARGETS = TOKENS.flatten()[SELECT + 1]


def scored(model: Any, tail: Any) -> Any:
    """The model's answer, its mean logits and its gradients, whole."""
    patch_head(model, tail=tail)
    out = model(input_ids=TOKENS, select=SELECT, targets=TARGETS)
    out.token_logps.backward(torch.linspace(-1, 1, len(TARGETS)))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def errors(folder: Path) -> dict[str, Any] | None:
    """The largest of what both models have, and whether generation is as it was.

    None where this version of transformers splits no vocabulary that the ranks do not divide.
    """
    alone: Any = AutoModelForCausalLM.from_pretrained(folder)
    try:
        split: Any = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    except ValueError as error:
        if "must be divisible" in str(error):
            return None
        raise
    assert isinstance(split.lm_head.weight, DTensor)
    before = split.generate(TOKENS[:1], max_new_tokens=5, do_sample=False).tolist()
    one, expected = scored(alone, "exact")
    two, found = scored(split, "exact")
    check_head(split)
    after = split.generate(TOKENS[:1], max_new_tokens=5, do_sample=False).tolist()
    apart = {
        name: ((found[name] - g).norm() / g.norm().clamp_min(1e-6)).item()
        for name, g in expected.items()
    }
    return {
        "logps": (two.token_logps - one.token_logps).abs().max().item(),
        "mean_logits": (two.mean_logits - one.mean_logits).abs().max().item(),
        "gradients": max(apart.values()),
        "head": apart.get("lm_head.weight", apart["model.embed_tokens.weight"]),
        "written": before == after,
    }


def refused(folder: Path) -> dict[str, str]:
    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")

    def with_figures() -> None:
        split = model()
        patch_head(split, figures=True)
        split(input_ids=TOKENS, select=SELECT, targets=TARGETS)

    def trained() -> None:
        PreferenceTrainer(model(), tiny_config(folder / "run"), tiny_pairs(4))

    def by_columns() -> None:
        whole = AutoModelForCausalLM.from_pretrained(folder)
        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(whole.lm_head.weight.detach(), mesh, [Shard(1)])
        whole.lm_head.weight = torch.nn.Parameter(weight)
        patch_head(whole)

    messages = {}
    for call in (with_figures, trained, by_columns):
        try:
            call()
        except UserError as error:
            messages[call.__name__] = str(error)
    return messages


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    models = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = {name: errors(folder / name) for name in models}
    told = {"models": found, "refused": refused(folder / models[0])}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
