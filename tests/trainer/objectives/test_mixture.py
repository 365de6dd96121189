"""Weighted sums of objectives against their parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import (
    build_objective,
    canonical_name,
    hyperparameters_of,
    spec_of,
    terms,
)
from widemargin.trainer.objectives.mixture import parts_of

from tests.support.objective_cases import MIXTURE
from tests.support.preference_batches import pack, random_pairs, reference_sums

PARTS = {"dpo": 0.8, "bco": 0.2, "sft": 1.0}


def test_a_mixture_has_one_name():
    assert canonical_name(PARTS) == canonical_name(MIXTURE) == MIXTURE
    assert canonical_name({"nca_pair": 2, "sigmoid": 1}) == "2*nca-pair + simpo"
    assert canonical_name({"dpo": 1.0}) == canonical_name(" dpo ") == "dpo"
    assert canonical_name({"dpo": 0.5}) == "0.5*dpo"
    assert build_objective(PARTS).name == MIXTURE
    assert canonical_name("0.8*dpo+0.2 * bco+sft") == MIXTURE
    assert canonical_name("1e+2*dpo-hinge+1E-2*sft") == "100*dpo-hinge + 0.01*sft"
    for nothing in ({}, {"dpo": True}, {"dpo": None}, {"dpo": float("nan")}):
        with pytest.raises(UserError, match="objective: "):
            canonical_name(nothing)


@pytest.mark.parametrize("weight", [1 / 3, 0.1 + 0.2, 1e22, 5e-324])
def test_a_mixtures_name_keeps_every_digit_of_a_weight(weight):
    name = canonical_name({"dpo": weight, "sft": 1})
    assert dict(parts_of(name)) == {"dpo": weight, "sft": 1}
    assert build_objective(name).name == name


def test_errors_name_the_parts_that_a_hyperparameter_is_of():
    with pytest.raises(UserError, match=r"< 0.5, got 0.5.*\(robust, a part"):
        build_objective("dpo + robust", label_smoothing=0.5)
    with pytest.raises(UserError, match=r"alpha \(weight of the chosen.*got -1.*\(cpo, a part"):
        build_objective("dpo + cpo", alpha=-1)
    with pytest.raises(UserError, match=r"did you mean 'beta'.*beta, .*alpha \(of cpo\)"):
        build_objective("dpo + cpo", betta=1)
    with pytest.raises(UserError, match="Known: sft_weight, nll, use_weighting, beta, "):
        build_objective("dpo + cpo", betta=1)


def test_a_shared_name_says_what_it_means_in_each_part():
    help = hyperparameters_of("cpo + orpo")["alpha"].metadata["help"]
    assert "likelihood (cpo); weight of the odds ratio, lambda (orpo); none: each" in help


def test_a_mixture_couples_and_needs_what_its_parts_do():
    assert spec_of(MIXTURE).couples_pairs
    assert spec_of(MIXTURE).needs_reference
    assert not spec_of("dpo + sft").couples_pairs
    assert not spec_of("simpo + sft").needs_reference
    assert build_objective("dpo + sft", nll="tokens").couples_pairs


@pytest.mark.parametrize("order", [PARTS, dict(reversed(PARTS.items()))], ids=list)
def test_losses_and_gradients_are_the_weighted_sums_of_the_parts(order):
    mixture = build_objective(order, beta=0.5, nll="tokens", sft_weight=0.3)
    parts = {name: build_objective(name, beta=0.5) for name in ("dpo", "bco")}
    parts["sft"] = build_objective("sft", nll="tokens")
    for seed in range(4):
        pairs = random_pairs(np.random.default_rng(seed), 6)
        tokens, cu_seqlens = pack(pairs)
        reference = reference_sums(pairs)
        out = mixture(tokens, cu_seqlens, reference)
        outs = {name: part(tokens, cu_seqlens, reference) for name, part in parts.items()}
        weights = PARTS | {"sft": 1.3}
        total = sum(weights[name] * each.losses for name, each in outs.items())
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(out.losses, total, rtol=1e-12, atol=1e-12)
        (found,) = torch.autograd.grad(out.losses.sum(), tokens)
        (expected,) = torch.autograd.grad(total.sum(), tokens)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(out.chosen_rewards, outs["dpo"].chosen_rewards)


def test_each_part_keeps_its_own_default_where_none_is_given():
    pairs = random_pairs(np.random.default_rng(0), 6)
    call = (*pack(pairs), reference_sums(pairs))
    sums, means = (build_objective(name)(*call).losses for name in ("dpo", "ipo"))
    torch.testing.assert_close(build_objective("dpo + ipo")(*call).losses, sums + means)
    given = build_objective("dpo + ipo", length_norm=True, beta=0.3)(*call).losses
    both = [build_objective(name, length_norm=True, beta=0.3) for name in ("dpo", "ipo")]
    torch.testing.assert_close(given, both[0](*call).losses + both[1](*call).losses)


def test_the_lengths_of_answers_are_gathered_once(monkeypatch):
    calls: list[int] = []
    real = terms.gather_pairs
    monkeypatch.setattr(terms, "gather_pairs", lambda *a: calls.append(1) or real(*a))
    objective = build_objective("cpo + orpo + sft", nll="tokens", sft_weight=0.5)
    objective(*pack(random_pairs(np.random.default_rng(0), 4)))
    assert len(calls) == 1
