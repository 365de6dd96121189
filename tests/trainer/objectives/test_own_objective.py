"""An objective of a user's own file: it trains, and its mistakes are named."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import OBJECTIVES, ObjectiveSpec, build_objective
from widemargin.trainer.objectives.settings import Hyperparameters, setting
from widemargin.trainer.objectives.terms import Terms, constant_margins

from tests.support.preference_batches import pack, random_pairs


@dataclass(frozen=True)
class Own(Hyperparameters):
    beta: float = setting(2.0, "scale of the rewards", above=0)


def terms(pairs, hp, state) -> Terms:
    chosen, rejected = (hp.beta * pairs.means).chunk(2)
    losses = softplus(rejected - chosen)
    return Terms(losses, chosen, rejected, constant_margins(pairs, 0.0))


def called(monkeypatch, function: Any, initial_state: Any = None) -> Any:
    spec = ObjectiveSpec("-log sigmoid(D)", Own, function, initial_state)
    monkeypatch.setitem(OBJECTIVES, "own", spec)
    return build_objective("own")


def batch(count: int = 3):
    return pack(random_pairs(np.random.default_rng(0), count))


def test_it_is_one_of_the_table(monkeypatch):
    found = called(monkeypatch, terms)(*batch())
    expected = build_objective("simpo", gamma_beta_ratio=0.0)(*batch())
    torch.testing.assert_close(found.losses, expected.losses)
    mixed = build_objective({"own": 0.5, "sft": 1.0}, beta=1.0)(*batch())
    assert mixed.loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: it.losses, "'own': return Terms; got Tensor"),
        (lambda it: replace(it, losses=it.losses.mean()), r"losses of shape \[3\].*got \[\]"),
        (lambda it: replace(it, losses=it.losses[:, None]), r"losses .* got \[3, 1\]"),
        (lambda it: replace(it, losses=it.losses.repeat(2)), r"losses .* got \[6\]"),
        (lambda it: replace(it, losses=it.losses.detach()), "losses .* are detached"),
        (lambda it: replace(it, target_margins=0.5), "target_margins .* got float"),
        (lambda it: replace(it, chosen_rewards=it.losses[:1]), r"chosen_rewards .* got \[1\]"),
        (lambda it: replace(it, state={"n": it.losses[0]}), r"as initial_state .*got n \(float"),
        (lambda it: replace(it, state={"mean": 1.0}), r"expected mean.*got mean \(float\)"),
    ],
)
def test_what_it_returns_is_checked(monkeypatch, change, message):
    def initial_state(hp):
        return {"mean": torch.zeros(())}

    objective = called(monkeypatch, lambda *inputs: change(terms(*inputs)), initial_state)
    with pytest.raises(UserError, match=message):
        objective(*batch())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda it: replace(it, losses=it.losses.mean()), r"'own': return losses of shape \[3\]"),
        (lambda it: replace(it, losses=it.losses.detach()), "'own': compute losses"),
    ],
)
def test_what_it_returns_is_checked_in_a_mixture(monkeypatch, change, message):
    called(monkeypatch, lambda *inputs: change(terms(*inputs)))
    with pytest.raises(UserError, match=message):
        build_objective({"own": 1.0, "sft": 1.0})(*batch())


@pytest.mark.parametrize("name", ["sums", "means", "lengths"])
def test_it_may_not_change_what_the_metrics_read(monkeypatch, name):
    def spoiling(pairs, hp, state):
        getattr(pairs, name).mul_(2)
        return terms(pairs, hp, state)

    objective = called(monkeypatch, spoiling)
    message = rf"'own': it changes pairs.{name} in place; .* 2 \* pairs.{name}"
    with pytest.raises(UserError, match=message):
        objective(*batch())
    with pytest.raises(UserError, match=message), torch.no_grad():
        objective.eval()(*batch())
    with torch.inference_mode():
        called(monkeypatch, terms).eval()(*batch())


def test_what_gathers_must_say_that_it_couples_pairs(monkeypatch):
    def gathering(pairs, hp, state):
        pairs.gather(pairs.means.chunk(2)[0]).mean()
        return terms(pairs, hp, state)

    with pytest.raises(UserError, match=r"set couples_pairs=True in the objective's row"):
        called(monkeypatch, gathering)(*batch())
    monkeypatch.setitem(OBJECTIVES, "own", replace(OBJECTIVES["own"], couples_pairs=True))
    assert build_objective("own")(*batch()).loss.isfinite()


def test_a_state_carries_no_graph_to_the_next_call(monkeypatch):
    def following(pairs, hp, state):
        found = terms(pairs, hp, state)
        mean = 0.9 * state["mean"] + found.losses.mean()
        return replace(found, losses=found.losses + mean, state={"mean": mean})

    objective = called(
        monkeypatch, following, lambda hp: {"mean": torch.zeros((), dtype=torch.float64)}
    )
    for _ in range(2):
        objective(*batch()).loss.backward()
    assert not objective.state_dict()["own.mean"].requires_grad


def test_hyperparameters_that_nothing_would_check_are_refused():
    @dataclass(frozen=True)
    class Bare(Hyperparameters):
        beta: float = 1.0

    @dataclass(frozen=True)
    class Plain(Hyperparameters):
        beta: float = field(default=1.0)

    class Undecorated(Hyperparameters):
        beta: float = setting(1.0, "scale")

    for kind in (Bare, Plain):
        with pytest.raises(TypeError, match=r"beta: declare it as setting\(default, help\)"):
            ObjectiveSpec("", kind, terms)
    with pytest.raises(TypeError, match=r"Undecorated: decorate it with @dataclass"):
        ObjectiveSpec("", Undecorated, terms)
