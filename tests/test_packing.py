"""Packed and prefix-shared rows: exactly what every sequence gives alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor
from widemargin.trainer.data import PairCollator, model_inputs
from widemargin.trainer.head import patch_head

BOUND = 5e-6

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma2": (
        "gemma2",
        {"sliding_window": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}),
}
EXACT = [
    pytest.param(family, attention, rows, id=f"{family}-{attention}-{rows}")
    for family in FAMILIES
    for attention, rows in (("sdpa", "dense"), ("sdpa", "varlen"), ("eager", "dense"))
    if not (family == "gemma2" and attention == "sdpa")
]


def pairs(count: int = 4, seed: int = 0, longest: int = 24) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(least: int) -> list[int]:
        length = int(torch.randint(least, longest, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: tokens(2 if name == names[0] else 1) for name in names} for _ in range(count)]


def family_model(family: str, attention: str) -> Any:
    name, changes = FAMILIES[family]
    model: Any = tiny_model(name, num_hidden_layers=3, **changes)
    model.config._attn_implementation = attention
    return model


def alone(model: Any, rows: list[dict[str, list[int]]]) -> Tensor:
    """Log-probs of every completion token, each sequence in a forward of its own."""
    parts = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            tokens = torch.tensor([[*row["prompt_ids"], *row[side]]])
            begin = len(row["prompt_ids"])
            logits = model(input_ids=tokens, use_cache=False).logits[0, begin - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(1, tokens[0, begin:, None])[:, 0])
    return torch.cat(parts)


def gradient(model: Any, logps: Tensor) -> Tensor:
    model.zero_grad()
    generator = torch.Generator().manual_seed(5)
    logps.backward(torch.randn(logps.shape, generator=generator))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def errors(model: Any, batch: dict[str, Any], rows: Any, checkpointing: bool = False) -> Any:
    """Largest difference in a log-prob, and the gradients' relative one, against `alone`."""
    plain = copy.deepcopy(model)
    plain.config._attn_implementation = "eager"
    expected = alone(plain, rows)
    expected_gradient = gradient(plain, expected)
    patch_head(model, tail="exact")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    logps = model(**model_inputs(batch)).token_logps
    worst = (logps - expected).abs().max().item()
    found = gradient(model, logps)
    return worst, ((found - expected_gradient).norm() / expected_gradient.norm()).item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("layout", ["packed", "prefix_shared"])
@pytest.mark.parametrize(("family", "attention", "rows"), EXACT)
def test_exact(family, attention, rows, layout, checkpointing):
    data = pairs()
    batch = PairCollator(0, layout=layout, rows=rows, area_cost=0.05)(data)
    worst, relative = errors(family_model(family, attention), batch, data, checkpointing)
    assert worst <= BOUND
    assert relative <= BOUND
