"""Weights and margins that the data give to pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import OBJECTIVES, build_objective

from tests.support.objective_cases import OF_PAIRS
from tests.support.preference_batches import pack, random_pairs

TAKES_MARGINS = {name for name, spec in OBJECTIVES.items() if spec.takes_margins}


def batch_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return pack(random_pairs(np.random.default_rng(0), count), torch.float32)


@pytest.mark.parametrize("name", sorted(TAKES_MARGINS))
def test_a_margin_adds_to_the_target_margin(name):
    """And the loss falls where it is negative: it is a target like gamma."""
    tokens, cu_seqlens = batch_of(4)
    reference = torch.linspace(-9.0, -3.0, 8)
    margins = torch.tensor([0.0, 0.5, -0.5, 2.0])
    plain, moved = (
        build_objective(name)(tokens, cu_seqlens, reference, margins=m) for m in (None, margins)
    )
    torch.testing.assert_close(moved.target_margins, plain.target_margins + margins)
    assert ((moved.losses - plain.losses)[1:] * margins[1:] > 0).all() or "beta" in name
    assert torch.equal(moved.losses[0], plain.losses[0]) or "beta" in name


@pytest.mark.parametrize("name", ["simpo", "hinge"])
def test_a_margin_equals_as_much_more_gamma(name):
    tokens, cu_seqlens = batch_of(4)
    more = build_objective(name, beta=2.0, gamma_beta_ratio=0.75)(tokens, cu_seqlens)
    by_data = build_objective(name, beta=2.0, gamma_beta_ratio=0.5)(
        tokens, cu_seqlens, margins=torch.full((4,), 0.5)
    )
    torch.testing.assert_close(by_data.losses, more.losses)


def test_objectives_without_a_target_margin_refuse_margins():
    tokens, cu_seqlens = batch_of(2)
    for name in set(OF_PAIRS) - TAKES_MARGINS:
        with pytest.raises(UserError, match="margin_from: none"):
            build_objective(name)(tokens, cu_seqlens, torch.zeros(4), margins=torch.ones(2))


def test_margins_go_to_the_parts_of_a_mixture_that_take_them():
    tokens, cu_seqlens = batch_of(2)
    reference, margins = torch.zeros(4), torch.ones(2)
    mixed = build_objective("ipo + 2*dpo")(tokens, cu_seqlens, reference, margins=margins)
    dpo = build_objective("dpo")(tokens, cu_seqlens, reference, margins=margins)
    ipo = build_objective("ipo")(tokens, cu_seqlens, reference)
    torch.testing.assert_close(mixed.losses, ipo.losses + 2 * dpo.losses)
    with pytest.raises(UserError, match="margin_from: none"):
        build_objective("ipo + sft")(tokens, cu_seqlens, reference, margins=margins)


@pytest.mark.parametrize("name", ["simpo", "lmpo", "dpo", "orpo"])
def test_weights_multiply_losses_and_ones_change_no_bit(name):
    tokens, cu_seqlens = batch_of(4)
    reference = torch.linspace(-9.0, -3.0, 8)
    plain, ones, weighted = (
        build_objective(name)(tokens, cu_seqlens, reference, weights=w)
        for w in (None, torch.ones(4), torch.tensor([0.0, 1.0, 2.0, 0.5]))
    )
    assert torch.equal(plain.losses, ones.losses)
    assert torch.equal(plain.loss, ones.loss)
    expected = plain.losses * torch.tensor([0.0, 1.0, 2.0, 0.5])
    torch.testing.assert_close(weighted.losses, expected)
    torch.testing.assert_close(weighted.loss, expected.mean())
    assert torch.equal(weighted.chosen_rewards, plain.chosen_rewards)


def test_edges_gather_sequences_that_pairs_share():
    """Three sequences, of which the first is in two pairs, against the same pairs one by one."""
    tokens = -torch.rand(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = tokens.clone().requires_grad_()
    whole = build_objective("simpo")(
        shared, torch.tensor([0, 4, 6, 9]), edges=torch.tensor([[0, 1], [0, 2]])
    )
    apart = tokens.clone().requires_grad_()
    each = torch.cat([apart[:4], apart[:4], apart[4:6], apart[6:]])
    pairs = build_objective("simpo")(each, torch.tensor([0, 4, 8, 10, 13]))
    assert torch.equal(whole.losses, pairs.losses)
    whole.loss.backward()
    pairs.loss.backward()
    torch.testing.assert_close(shared.grad, apart.grad)
    with pytest.raises(UserError, match="edges: give them"):
        build_objective("simpo")(shared, torch.tensor([0, 4, 6, 9]))
