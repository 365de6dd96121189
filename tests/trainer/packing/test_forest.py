"""Trees of several answers: the losses and gradients of the same pairs, one by one."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING
from widemargin.trainer.model.head import patch_head
from widemargin.trainer.objectives import build_objective
from widemargin.trainer.packing import PairCollator, model_inputs
from widemargin.trainer.packing.recurrent import keep_sequences_apart

from tests.support.packed_rows import FAMILIES, RECURRENT, RELATIVES, family_model
from tests.support.tree_pairs import apart, token_trees

LAYOUTS = [
    ("padded", "eager", "dense"),
    ("packed", "sdpa", "varlen"),
    ("prefix_shared", "sdpa", "varlen"),
    ("prefix_shared", "sdpa", "dense"),
    ("prefix_shared", "eager", "dense"),
]


def losses_and_gradient(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    out = build_objective("simpo")(
        model(**model_inputs(batch)).token_logps, batch["cu_seqlens"], edges=batch["edges"]
    )
    out.loss.backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return out.losses.detach(), torch.cat(gradient)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "olmo3", "smollm3"])
def test_trees_equal_the_same_pairs_one_by_one(family):
    """Up to seven answers, sliding windows of 8; every layout against padded pairs."""
    rows = token_trees()
    model = family_model(family)
    patch_head(model, tail="exact")
    losses, gradient = losses_and_gradient(model, PairCollator(0)(apart(rows)))
    for layout, attention, kind in LAYOUTS:
        model.config._attn_implementation = attention
        batch = PairCollator(0, layout=layout, rows=kind, area_cost=0.01)(rows)
        assert len(batch["cu_seqlens"]) - 1 == 7 + 2 + 4
        ours, mine = losses_and_gradient(model, batch)
        assert (ours - losses).abs().max() < 1e-5, layout
        assert (mine - gradient).norm() < 1e-5 * gradient.norm(), layout


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_softcaps_and_experts(family):
    assert family in FAMILIES | RELATIVES
    rows = token_trees((5, 3))
    model = family_model(family)
    patch_head(model, tail="exact")
    losses, gradient = losses_and_gradient(model, PairCollator(0)(apart(rows)))
    shared = PairCollator(0, layout="prefix_shared")(rows)
    ours, mine = losses_and_gradient(model, shared)
    assert (ours - losses).abs().max() < 1e-5
    assert (mine - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("family", ["lfm2", "bamba"])
def test_recurrent_layers(family):
    """Scans run answer by answer, each over its prompt."""
    if RECURRENT[family][0] not in CONFIG_MAPPING:
        pytest.skip("the installed transformers has no such family")
    rows = token_trees((4, 2))
    model = family_model(family, "sdpa").eval()
    keep_sequences_apart(model)
    patch_head(model, tail="exact")
    losses, gradient = losses_and_gradient(model, PairCollator(0)(apart(rows)))
    shared = PairCollator(0, layout="prefix_shared", rows="varlen")(rows)
    ours, mine = losses_and_gradient(model, shared)
    assert (ours - losses).abs().max() < 2e-5
    assert (mine - gradient).norm() < 2e-5 * gradient.norm()


def test_every_answer_once_and_pairs_as_edges():
    rows = token_trees((3, 2))
    batch = PairCollator(0, layout="prefix_shared", rows="varlen")(rows)
    leaves = [rows[0]["chosen_ids"], rows[2]["chosen_ids"]]  # the first of either tree
    leaves += [rows[0]["rejected_ids"], rows[2]["rejected_ids"], rows[1]["rejected_ids"]]
    assert batch["targets"].tolist() == [token for leaf in leaves for token in leaf]
    assert batch["edges"].tolist() == [[0, 2], [0, 4], [1, 3]]
    once = sum(map(len, leaves)) + len(rows[0]["prompt_ids"]) + len(rows[2]["prompt_ids"])
    assert batch["input_ids"].numel() == batch["decoder_tokens"][0] == once
    longest = max(len(r["prompt_ids"]) + len(r[s]) for r in rows for s in SIDES)
    assert batch["decoder_tokens"].tolist() == [once, once, 6 * longest]


SIDES = ("chosen_ids", "rejected_ids")


def test_pairs_alone_are_trees_of_two_leaves():
    """Numbers that no rows share change nothing, bit for bit."""
    rows = apart(token_trees())
    numbered = [
        row | {"tree_id": 7 * i, "leaf_ids": [3 * i, 3 * i + 1]} for i, row in enumerate(rows)
    ]
    for layout, _, kind in LAYOUTS:
        collator = PairCollator(0, layout=layout, rows=kind)
        plain, trees = collator(rows), collator(numbered)
        assert plain.keys() == trees.keys()
        for name, value in plain.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(trees[name])), name
        assert plain["edges"].tolist() == [[i, len(rows) + i] for i in range(len(rows))]


def test_what_rows_say_of_a_leaf_is_taken_once():
    rows = [
        row | {
            "chosen_unscored": [0], "rejected_unscored": [],
            "reference_chosen_logps": -1.0, "reference_rejected_logps": -2.0 - i,
        }
        for i, row in enumerate(token_trees((3,)))
    ]  # fmt: skip
    if len(rows[0]["chosen_ids"]) == 1:
        pytest.skip("the chosen answer has one token")
    batch = PairCollator(0, layout="prefix_shared")(rows)
    assert batch["reference_logps"].tolist() == [-1.0, -2.0, -3.0]
    lengths = batch["cu_seqlens"].diff().tolist()
    assert lengths == [
        len(rows[0]["chosen_ids"]) - 1, len(rows[0]["rejected_ids"]), len(rows[1]["rejected_ids"])
    ]  # fmt: skip
    assert batch["targets"][0] == rows[0]["chosen_ids"][1]
