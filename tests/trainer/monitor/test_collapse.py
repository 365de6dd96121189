"""Signs of a collapse: in made-up logs, and in the recorded runs of the studies."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from widemargin.trainer.monitor.collapse import KINDS, Watch, repetition

RUNS = Path(__file__).with_name("collapse_runs.json")
STUDIES = Path(__file__).parents[3] / "bench" / "results" / "studies"


def signs(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """The steps at which kinds showed, each once."""
    watch = Watch()
    seen = [sign for entry in entries for sign in watch.add(entry)]
    assert {sign.kind: sign for sign in seen} == watch.signs
    assert len(seen) == len(watch.signs)
    return {sign.kind: sign.step for sign in seen}


def log(key: str, values: Iterable[float], first: int = 1, every: int = 1) -> list[dict[str, Any]]:
    return [{"step": first + i * every, key: value} for i, value in enumerate(values)]


def test_a_fall_of_the_chosen_is_seen_once_its_mean_has_fallen() -> None:
    falling = [-1.0] * 10 + [-3.0] * 30
    assert signs(log("logps/chosen_mean", falling)) == {"chosen": 16}  # 6 of 10 steps
    assert signs(log("logps/chosen_mean", [-1.0, -1.9, -2.1, -5.0], 10, 10)) == {"chosen": 30}


def test_rising_and_single_steps_are_no_sign() -> None:
    assert signs(log("logps/chosen_mean", [-3.0] * 10 + [-0.1] * 20)) == {}
    noisy = [-1.0 - 4.0 * (step % 7 == 0) for step in range(60)]
    assert signs(log("logps/chosen_mean", noisy)) == {}


def test_steps_of_few_pairs_do_not_trip_it() -> None:
    """Each step's mean is off by up to 3 nats; the fall of 10 steps' mean is within its error."""
    swings = [-1.0, -4.0, -1.5, -3.5, -0.5, -4.5, -1.0, -2.0, -3.0, -4.0]
    calm = [-1.0, -2.0, -1.0, -3.0, -0.5, -1.5, -2.5, -1.0, -1.0, -1.4]
    assert signs(log("logps/chosen_mean", calm + swings)) == {}
    assert signs(log("logps/chosen_mean", calm + [v - 1 for v in swings])) == {"chosen": 19}


def test_held_out_falls_count_from_the_first_evaluation() -> None:
    assert signs(log("eval_logps/chosen_mean", [-1.0, -1.5, -2.2], 0, 5)) == {"held-out chosen": 10}


def test_each_of_several_evaluation_sets_counts_from_its_own_beginning() -> None:
    easy = log("eval_easy_logps/chosen_mean", [-1.0, -1.2, -1.4], 0, 5)
    hard = log("eval_hard_logps/chosen_mean", [-3.0, -3.5, -4.2], 0, 5)
    by_step = [entry for pair in zip(easy, hard, strict=True) for entry in pair]
    assert signs(by_step) == {"held-out chosen": 10}
    assert signs(by_step[:-1]) == {}


def test_answers_that_end_at_once_are_a_sign() -> None:
    """As SimPO's with 40% of wrong labels did in the study of a real model; a half is none."""
    assert signs(log("samples/tokens", [80.0, 40.0, 12.0, 4.0], 0, 5)) == {"shortness": 15}
    assert signs(log("samples/tokens", [20.0, 10.0, 5.0, 4.0], 0, 5)) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_its_figures_and_shows_once(kind: str) -> None:
    key, is_bad, _, window = KINDS[kind]
    before, now = next(
        (b, n) for b in (0.1, 1.0, -1.0, 50.0) for n in (-9.0, 0.9, 9.0, 500.0) if is_bad(b, n)
    )
    entries = log(key, [before] * 10 + [now] * 20)
    watch = Watch()
    (sign,) = [sign for entry in entries for sign in watch.add(entry)]
    assert sign.kind == kind
    assert sign.before == pytest.approx(before)
    assert window > 1 or sign.step == 11
    assert f"step {sign.step}: " in str(sign)


def test_what_is_absent_or_not_finite_counts_for_nothing() -> None:
    entries = log("logps/chosen_mean", [math.nan, -1.0, math.inf, -1.1, -1.0])
    entries += [{"step": 6, "loss": 0.5}, {"logps/chosen_mean": -9.0}, {"step": 7, "entropy": None}]
    assert signs(entries) == {}
    assert signs([]) == {}


def test_repetition_is_the_share_of_4_grams_seen_before() -> None:
    assert repetition([]) == repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_a_real_model_is_warned_of_20_steps_before_its_accuracy_falls() -> None:
    """By the log alone, and earlier by its answers; at a usual learning rate not at all."""
    bad, good = json.loads(RUNS.read_text(encoding="utf-8"))
    accuracy = [(each["step"], each["accuracy"]) for each in bad["evaluations"]]
    falls = next(step for (_, a), (step, b) in itertools.pairwise(accuracy) if b < a)
    assert max(signs(bad["log"])["chosen"], *signs(bad["evaluations"]).values()) <= falls
    assert signs(bad["log"])["chosen"] <= falls - 20
    assert signs(bad["evaluations"])["length"] <= falls - 20
    assert signs(good["log"]) == signs(good["evaluations"]) == {}


def recorded() -> list[Any]:
    """Runs of `bench.studies` that differ in their learning rate: 2e-4 for most, 5e-5."""
    lines = (STUDIES / "tail.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines]
    runs = [run for run in runs if run["arm"].startswith("exact, ")]
    return [pytest.param(run, id=f"{run['arm']}, seed {run['seed']}") for run in runs]


@pytest.mark.parametrize("run", recorded())
def test_recorded_runs(run: dict[str, Any]) -> None:
    """At 2e-4 chosen answers lose 3 nats a token or more; at 5e-5 they lose none."""
    found = signs(log("logps/chosen_mean", run["curves"]["chosen_mean_logp"]))
    if "learning rate 5e-5" in run["arm"]:
        assert found == {}
    else:
        assert 20 < found["chosen"] < 100
