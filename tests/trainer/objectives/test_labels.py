"""Objectives of single answers with labels, against losses computed plainly."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import OBJECTIVES, ObjectiveOutput, build_objective
from widemargin.trainer.objectives.lists import Answers

from tests.support.preference_batches import mean, sigmoid

LABELLED = [name for name, spec in OBJECTIVES.items() if "labelled" in spec.takes]

Answer = tuple[list[float], float, bool]  # token logps, reference's sum, whether it is desirable


def answers_of(seed: int, count: int = 7) -> list[Answer]:
    rng = np.random.default_rng(seed)
    tokens = [(-np.abs(rng.standard_normal(rng.integers(1, 12)))).tolist() for _ in range(count)]
    return [(each, math.fsum(each) + rng.normal(), bool(rng.integers(2))) for each in tokens]


def batch_of(answers: list[Answer], mismatched: list[float] | None = None) -> dict[str, Any]:
    count, lengths = len(answers), [len(tokens) for tokens, _, _ in answers]
    tokens = torch.tensor([x for each, _, _ in answers for x in each], dtype=torch.float64)
    return {
        "token_logps": tokens.requires_grad_(),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)]),
        "reference": torch.tensor([sums for _, sums, _ in answers], dtype=torch.float64),
        "edges": torch.arange(count)[:, None].repeat(1, 2),
        "answers": Answers(
            tree_ids=torch.arange(count),
            labels=torch.tensor([label for _, _, label in answers], dtype=torch.bool),
            mismatched=None
            if mismatched is None
            else torch.tensor(mismatched, dtype=torch.float64),
        ),
    }


def run(name: str, batch: dict[str, Any], **hyperparameters: Any) -> ObjectiveOutput:
    return build_objective(name, **hyperparameters)(**batch)


def ratios(answers: list[Answer], per_token: bool = False) -> list[float]:
    return [
        (math.fsum(tokens) - reference) / (len(tokens) if per_token else 1)
        for tokens, reference, _ in answers
    ]


def losses_of(
    rho: list[float], labels: list[bool], kl: float, beta: float, weights: tuple[float, float]
) -> list[float]:
    return [
        weights[0] * (1 - sigmoid(beta * (x - kl)))
        if label
        else weights[1] * (1 - sigmoid(beta * (kl - x)))
        for x, label in zip(rho, labels, strict=True)
    ]


@pytest.mark.parametrize("estimate", ["batch", "mismatched", "none"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7)])
def test_losses_match_the_formula(estimate, weights):
    given = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    positive = 0
    for seed in range(8):
        answers, other = answers_of(seed), np.random.default_rng(seed).normal(size=7).tolist()
        name, kl, rho = "kto", 0.0, ratios(answers)
        if estimate == "none":
            name, other = "apo-zero-unpaired", None
        else:
            kl = max(0.0, mean(rho if estimate == "batch" else other))
            other = None if estimate == "batch" else other
            given["kl_estimate"] = estimate  # pyright: ignore[reportArgumentType]
        positive += kl > 0
        labels = [label for _, _, label in answers]
        batch = batch_of(answers, other)
        out = run(name, batch, beta=0.5, **given)
        expected = losses_of(rho, labels, kl, 0.5, weights)
        assert out.losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert out.loss.item() == pytest.approx(mean(expected), rel=1e-9)
        out.losses.sum().backward()
        slopes = []
        for x, label in zip(rho, labels, strict=True):
            s = sigmoid(0.5 * (x - kl))
            slopes.append(0.5 * s * (1 - s) * (-weights[0] if label else weights[1]))
        first = batch["cu_seqlens"][:-1]
        assert batch["token_logps"].grad[first].tolist() == pytest.approx(slopes, rel=1e-9)
        chosen, rejected = out.sides.chunk(2)
        assert chosen.tolist() == labels
        assert rejected.tolist() == [not label for label in labels]
        rewards = torch.where(chosen, out.chosen_rewards, out.rejected_rewards)
        assert rewards.tolist() == pytest.approx([0.5 * x for x in rho])
        gaps = out.chosen_rewards - out.rejected_rewards
        assert [g > 0 for g in gaps] == [
            (x > kl) == label for x, label in zip(rho, labels, strict=True)
        ]
    assert positive or estimate == "none"


def test_rewards_per_token():
    answers = answers_of(0)
    for name, kl in (("kto", max(0.0, mean(ratios(answers, True)))), ("apo-zero-unpaired", 0.0)):
        out = run(name, batch_of(answers), length_norm=True)
        labels = [label for _, _, label in answers]
        expected = losses_of(ratios(answers, True), labels, kl, 0.1, (1.0, 1.0))
        assert out.losses.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [True, False])
def test_batches_of_one_label_are_finite(name, label):
    answers = [(tokens, sums, label) for tokens, sums, _ in answers_of(1)]
    batch = batch_of(answers)
    out = run(name, batch)
    out.loss.backward()
    assert out.losses.isfinite().all()
    assert batch["token_logps"].grad.isfinite().all()
    assert out.sides.sum() == len(answers)


@pytest.mark.parametrize("name", LABELLED)
def test_fillers_are_ignored(name):
    answers = answers_of(2)
    filler = ([-1.0], math.nan, True)
    batch = batch_of([*answers, filler])
    batch["pair_ids"] = torch.tensor([*range(7), -1])
    out = run(name, batch)
    out.loss.backward()
    expected = run(name, batch_of(answers))
    assert torch.equal(out.losses[:7], expected.losses)
    assert out.losses[7] == 0
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-14)
    assert not out.sides.reshape(2, -1)[:, 7].any()
    assert batch["token_logps"].grad[:-1].isfinite().all()
    assert batch["token_logps"].grad[-1] == 0


@pytest.mark.parametrize("name", LABELLED)
def test_the_likelihood_is_of_desirable_answers_alone(name):
    answers = answers_of(3)
    plain, more = (run(name, batch_of(answers), sft_weight=w) for w in (0.0, 0.5))
    nll = [-mean(tokens) if label else 0.0 for tokens, _, label in answers]
    assert (more.losses - plain.losses).tolist() == pytest.approx([0.5 * x for x in nll])
    with pytest.raises(UserError, match="nll: leave it at answers for single answers"):
        run(name, batch_of(answers), sft_weight=0.5, nll="tokens")


def test_what_does_not_fit_is_refused():
    labelled = batch_of(answers_of(0))
    for name, given, message in (
        ("dpo", {}, "labels: take kto or apo-zero-unpaired; dpo needs pairs"),
        ("kto + sft", {}, "labels: take kto or apo-zero-unpaired"),
        ("infonca", {}, "labels: take kto or"),
        ("kto", {"use_weighting": True}, "use_weighting: leave it out"),
        ("kto", {"ld_alpha": 0.5}, "ld_alpha 0.5: leave it out"),
        ("kto", {"kl_estimate": "mismatched"}, "mismatched: give the log-ratios"),
    ):
        with pytest.raises(UserError, match=message):
            run(name, labelled, **given)
    pairs = labelled | {"answers": None, "edges": torch.tensor([[0, 1], [2, 3]])}
    assert run("kto", pairs).loss.isfinite()
    with pytest.raises(UserError, match="labels: give one for every answer"):
        run("apo-zero-unpaired", pairs)
    with pytest.raises(UserError, match="kl_estimate: set it to batch; pairs have no"):
        run("kto + sft", pairs, kl_estimate="mismatched")
    with pytest.raises(UserError, match="length_norm: leave it out"):
        build_objective("kto", kl_estimate="mismatched", length_norm=True)
    with pytest.raises(UserError, match="use_weighting: leave it out"):
        build_objective("apo-zero-unpaired", use_weighting=True)
    with pytest.raises(UserError, match="leave one of apo-zero-unpaired, sft out"):
        build_objective("apo-zero-unpaired + sft")
