"""Listwise objectives against losses computed plainly, and what holds for all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from widemargin.kernels.margin_loss.function import sequence_logps
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import OBJECTIVES, ObjectiveOutput, build_objective
from widemargin.trainer.objectives.lists import Answers

from tests.support import plain_lists as plain
from tests.support.preference_batches import mean

LISTWISE = [name for name, spec in OBJECTIVES.items() if spec.takes == ("scored",)]

Prompt = list[tuple[list[float], float, float]]  # answers: token logps, reference's sum, score


def prompts_of(seed: int, sizes: tuple[int, ...] = (7, 2, 4, 3)) -> list[Prompt]:
    """Scores are whole or half numbers, so that some are equal."""
    rng = np.random.default_rng(seed)

    def answer() -> tuple[list[float], float, float]:
        tokens = (-0.3 * np.abs(rng.standard_normal(rng.integers(1, 12)))).tolist()
        total = math.fsum(tokens)
        return tokens, total + rng.normal() / 3, rng.integers(-2, 5) / 2

    prompts = [[answer() for _ in range(size)] for size in sizes]
    for prompt in prompts:  # one better than another at least
        prompt[0] = (*prompt[0][:2], 3.0)
    return prompts


def batch_of(prompts: list[Prompt], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Answers in the order of a batch: the first of every prompt, then the second of every one."""
    places = [(i, tree) for tree, prompt in enumerate(prompts) for i in range(len(prompt))]
    places.sort()
    number = {place: sequence for sequence, place in enumerate(places)}
    answers = [prompts[tree][i] for i, tree in places]
    edges = [
        (number[i, tree], number[j, tree])
        for tree, prompt in enumerate(prompts)
        for i, j in itertools.permutations(range(len(prompt)), 2)
        if prompt[i][2] > prompt[j][2]
    ]
    lengths = [len(tokens) for tokens, _, _ in answers]
    tokens = torch.tensor([x for each, _, _ in answers for x in each], dtype=dtype)
    return {
        "token_logps": tokens.requires_grad_(),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)]),
        "reference": torch.tensor([sums for _, sums, _ in answers], dtype=dtype),
        "edges": torch.tensor(edges, dtype=torch.int64).reshape(-1, 2),
        "answers": Answers(
            tree_ids=torch.tensor([tree for _, tree in places]),
            scores=torch.tensor([score for _, _, score in answers], dtype=dtype),
        ),
    }


def run(name: str, batch: dict[str, Any], **hyperparameters: Any) -> ObjectiveOutput:
    return build_objective(name, **hyperparameters)(**batch)


def ratios(prompt: Prompt, beta: float, per_token: bool = False) -> list[float]:
    return [
        beta * (math.fsum(tokens) - reference) / (len(tokens) if per_token else 1)
        for tokens, reference, _ in prompt
    ]


def means(prompt: Prompt) -> list[float]:
    return [mean(tokens) for tokens, _, _ in prompt]


def scores(prompt: Prompt) -> list[float]:
    return [score for _, _, score in prompt]


def of_rrhf(prompt: Prompt, weight: float = 1.0, power: float = 1.0) -> float:
    p = [math.fsum(tokens) / len(tokens) ** power for tokens, _, _ in prompt]
    return plain.rrhf(p, scores(prompt)) + weight * plain.best_nll(means(prompt), scores(prompt))


def of_pro(prompt: Prompt, beta: float = 1.0, weight: float = 0.05) -> float:
    likelihood = (len(prompt) - 1) ** 2 * plain.best_nll(means(prompt), scores(prompt))
    rewards = [beta * each for each in means(prompt)]
    return plain.pro(rewards, scores(prompt)) + weight * likelihood


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Prompt], float]]] = {
    "infonca": ("infonca", {}, lambda x: plain.infonca(ratios(x, 0.01), scores(x))),
    "infonca, sharper": (
        "infonca",
        {"beta": 2.0, "score_temperature": 0.3, "length_norm": True},
        lambda x: plain.infonca(ratios(x, 2.0, True), scores(x), 0.3),
    ),
    "nca": ("nca", {}, lambda x: plain.nca(ratios(x, 0.01), scores(x))),
    "nca, sharper": (
        "nca",
        {"beta": 2.0, "score_temperature": 0.3, "length_norm": True},
        lambda x: plain.nca(ratios(x, 2.0, True), scores(x), 0.3),
    ),
    "plackett-luce": (
        "plackett-luce",
        {},
        lambda x: plain.plackett_luce(ratios(x, 0.1), scores(x)),
    ),
    "plackett-luce per token": (
        "plackett-luce",
        {"beta": 2.0, "length_norm": True},
        lambda x: plain.plackett_luce(ratios(x, 2.0, True), scores(x)),
    ),
    "lipo": ("lipo", {}, lambda x: plain.lipo(ratios(x, 0.1), scores(x))),
    "lipo, scaled": (
        "lipo",
        {"beta": 2.0, "score_scale": 0.5, "length_norm": True},
        lambda x: plain.lipo(ratios(x, 2.0, True), scores(x), 0.5),
    ),
    "rrhf": ("rrhf", {}, of_rrhf),
    "rrhf as released": (
        "rrhf",
        {"likelihood_weight": 0.01, "length_penalty": 0.5},
        lambda x: of_rrhf(x, 0.01, 0.5),
    ),
    "pro": ("pro", {}, of_pro),
    "pro, sharper": (
        "pro",
        {"beta": 3.0, "likelihood_weight": 0.2},
        lambda x: of_pro(x, 3.0, 0.2),
    ),
}


def test_every_listwise_objective_has_a_case():
    assert {name for name, _, _ in CASES.values()} == set(LISTWISE)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_match_a_plain_computation(case):
    name, hyperparameters, expected = CASES[case]
    for seed in range(8):
        prompts = prompts_of(seed)
        batch = batch_of(prompts)
        out = run(name, batch, sft_weight=0.3, **hyperparameters)

        def whole(prompts: list[Prompt]) -> float:
            return mean([expected(x) + 0.3 * plain.best_nll(means(x), scores(x)) for x in prompts])

        assert out.loss.item() == pytest.approx(whole(prompts), rel=1e-9, abs=1e-9)
        assert out.count.item() == len(prompts)
        if name == "lipo":  # whose weights are held constant: see the next test
            continue
        out.loss.backward()
        begins = batch["cu_seqlens"].tolist()
        trees = batch["answers"].tree_ids.tolist()
        h = 1e-6
        for sequence in (0, 5, len(trees) - 1):
            tree = trees[sequence]
            i = trees[:sequence].count(tree)
            sides = []
            for step in (h, -h):
                moved = [list(prompt) for prompt in prompts]
                tokens, *rest = moved[tree][i]
                moved[tree][i] = ([tokens[0] + step, *tokens[1:]], *rest)  # pyright: ignore
                sides.append(whole(moved))
            gradient = batch["token_logps"].grad[begins[sequence]].item()
            assert gradient == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-4, abs=1e-7)


def test_the_weights_of_lipo_are_constant_and_never_vanish_at_the_reference():
    prompts = prompts_of(0)[:1]
    batch = batch_of(prompts)
    batch["reference"] = sequence_logps(batch["token_logps"].detach(), batch["cu_seqlens"])[0]
    out = run("lipo", batch, beta=1.0)
    out.loss.backward()
    assert out.loss.item() > 0.1
    gains, discounts = [2**s for s in scores(prompts[0])], []
    for i, score in enumerate(scores(prompts[0])):
        ahead = [(-s, j) < (-score, i) for j, s in enumerate(scores(prompts[0]))]
        discounts.append(1 / math.log(2 + sum(ahead)))
    slopes = [
        math.fsum(
            abs(gains[i] - gains[j]) * abs(discounts[i] - discounts[j]) * sign / 2
            for j, other in enumerate(scores(prompts[0]))
            if (sign := int(other > score) - int(other < score))
        )
        for i, score in enumerate(scores(prompts[0]))
    ]
    first = batch["cu_seqlens"][:-1]
    assert batch["token_logps"].grad[first].tolist() == pytest.approx(slopes, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "of_pairs", "hyperparameters"),
    [
        ("plackett-luce", "dpo", {}),
        ("infonca", "dpo", {"score_temperature": 1e-4}),
        ("nca", "nca-pair", {"score_temperature": 1e-4}),
    ],
)
def test_of_two_answers_they_are_losses_of_pairs(name, of_pairs, hyperparameters):
    prompts = [sorted(p, key=lambda a: -a[2]) for p in prompts_of(3, (2,) * 9)]
    assert all(p[0][2] > p[1][2] for p in prompts[1:])
    prompts = [p for p in prompts if p[0][2] > p[1][2]]
    gradients = []
    for each, others in ((name, hyperparameters), (of_pairs, {})):
        batch = batch_of(prompts)
        out = run(each, batch, beta=0.7, **others)
        out.losses.sum().backward()
        gradients.append((out.losses.detach(), batch["token_logps"].grad))
        assert out.count.item() == len(prompts)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LISTWISE)
def test_the_other_prompts_of_a_batch_change_nothing(name):
    """Nor do fillers, whose numbers may be none, the order of prompts, or one that is broken."""
    prompts = prompts_of(1)
    alone = [run(name, batch_of([prompt])).loss.item() for prompt in prompts]
    out = run(name, batch_of(prompts))
    assert out.loss.item() == pytest.approx(mean(alone), rel=1e-12)
    assert run(name, batch_of(prompts[::-1])).loss.item() == pytest.approx(mean(alone), rel=1e-12)
    filler: Prompt = [([-1.0], math.nan, 1.0), ([-2.0], math.nan, 0.0)]
    batch = batch_of([*prompts, filler])
    pairs = len(batch["edges"])
    batch["pair_ids"] = torch.arange(pairs)
    batch["pair_ids"][batch["answers"].tree_ids[batch["edges"][:, 0]] == len(prompts)] = -1
    out = run(name, batch, sft_weight=0.1)
    out.loss.backward()
    assert out.count.item() == len(prompts)
    expected = run(name, batch_of(prompts), sft_weight=0.1).loss.item()
    assert out.loss.item() == pytest.approx(expected, rel=1e-12)
    assert batch["token_logps"].grad.isfinite().all()
    broken: Prompt = [([math.nan], -1.0, 1.0), ([-2.0], -1.0, 0.0)]
    out = run(name, batch_of([*prompts, broken]))
    assert int(out.losses.isnan().sum()) == 1
    assert out.losses.nansum().item() == pytest.approx(math.fsum(alone), rel=1e-12)


@pytest.mark.parametrize("name", LISTWISE)
def test_awkward_lists_are_finite_in_every_dtype(name):
    lists: list[list[Prompt]] = [
        [[([-0.5], -0.5, 1.0), ([-0.5], -0.5, 0.0), ([-0.5], -0.5, 0.0)]],
        [[([], 0.0, 10.0), ([-0.1], -0.2, -10.0)]],
        [[([-900.0] * 4, -1.0, 1.0), ([-1e-9], -900.0, 0.5), ([-0.0], -0.0, 0.0)]],
    ]
    for prompts in lists:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            batch = batch_of(prompts, dtype)
            out = run(name, batch, sft_weight=0.1)
            out.loss.backward()
            assert out.losses.isfinite().all()
            assert batch["token_logps"].grad.isfinite().all()
            assert batch["token_logps"].grad.any() or not len(prompts[0][0][0])


@pytest.mark.parametrize("name", LISTWISE)
def test_no_lists_at_all(name):
    batch = batch_of([])
    batch["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    batch["answers"] = Answers(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    out = run(name, batch)
    out.loss.backward()
    assert out.loss.item() == 0


def test_weights_multiply_a_lists_loss():
    prompts = prompts_of(2)
    batch = batch_of(prompts)
    plain_losses = run("infonca", batch).losses
    tree = batch["answers"].tree_ids[batch["edges"][:, 0]]
    out = run("infonca", batch | {"weights": torch.tensor([1.0, 2.0, 0.0, 0.5])[tree]})
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, tree, plain_losses)
    expected = (sums * torch.tensor([1.0, 2.0, 0.0, 0.5])).sum() / 4
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_margins_and_accuracies_are_those_of_pairs():
    prompts = prompts_of(2)
    ours, pairs = (run(name, batch_of(prompts), beta=0.3) for name in ("plackett-luce", "dpo"))
    for name in ("chosen_rewards", "rejected_rewards", "target_margins", "chosen_mean_logps"):
        torch.testing.assert_close(getattr(ours, name), getattr(pairs, name))


@pytest.mark.parametrize("name", LISTWISE)
def test_data_without_scores_are_refused(name):
    batch = batch_of(prompts_of(0))
    for answers in (None, Answers(batch["answers"].tree_ids)):
        with pytest.raises(UserError, match=f"scores: give the scores of all.*{name} ranks"):
            run(name, batch | {"answers": answers})


def test_what_has_no_meaning_for_lists_is_refused():
    with pytest.raises(UserError, match="nll: leave it at answers"):
        build_objective("rrhf", nll="tokens")
    with pytest.raises(UserError, match="use_weighting: leave it out"):
        build_objective("infonca", use_weighting=True)
    with pytest.raises(UserError, match="leave one of infonca, sft out"):
        build_objective({"infonca": 1.0, "sft": 0.5})
    batch = batch_of(prompts_of(0))
    both = run("infonca + 2*rrhf", batch, beta=0.01).loss
    apart = run("infonca", batch).loss + 2 * run("rrhf", batch).loss
    torch.testing.assert_close(both, apart)
