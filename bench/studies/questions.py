"""What each study asks, and the runs that answer it. A study is a function of its seeds."""

from __future__ import annotations

import dataclasses
from typing import Any

SIMPO = {"objective": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.55}
"""SimPO's values for Llama-3-8B-Instruct."""
GAMMA_SIMPO = {"beta": 10.0, "gamma_beta_ratio": 0.4}
"""γ-SimPO's values for Llama-3-8B-Instruct; its temperature τ is the default, 10."""
LEARNING_RATE = 2e-4
"""For the 11M-parameter model: 5e-5 moves nothing to speak of in a hundred steps of eight pairs."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: ``settings`` are `PreferenceConfig`'s."""

    study: str
    arm: str
    seed: int
    steps: int
    pairs_per_step: int
    measure_every: int  # steps between measurements on the test pairs
    settings: dict[str, Any]
    answers: int = 0  # sampled per test instruction at each measurement
    sharpen: float = 1.0  # factor on the logits of the model that training starts from
    train_length: int = 384  # tokens of a pair's longer side
    test_length: int = 512
    max_new_tokens: int = 384

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


def tail(seed: int) -> list[Run]:
    """Does ``head_tail: mean`` train like the exact gradient, and down to which ``head_tail_eps``?

    A control: the same sums in another order.
    """
    exact, mean = {"head_tail": "exact"}, {"head_tail": "mean"}
    ways = {"exact": exact, "mean 2^-11": mean | {"head_tail_eps": 2.0**-11}}
    more = {
        "mean 2^-12": mean | {"head_tail_eps": 2.0**-12},
        "mean 2^-13": mean | {"head_tail_eps": 2.0**-13},
        "exact in another order": exact | {"packing": "packed"},
    }
    slow = {"learning_rate": 5e-5}
    models: list[tuple[str, float, dict[str, Any], dict[str, dict[str, Any]]]] = [
        ("logits x 1", 1.0, {}, ways | more),
        ("logits x 2", 2.0, {}, ways | more),
        ("logits x 1, learning rate 5e-5", 1.0, slow, ways),
        ("logits x 2, learning rate 5e-5", 2.0, slow, ways),
    ]
    size = {"steps": 150, "pairs_per_step": 4, "measure_every": 150}
    return [
        Run(
            "tail", f"{way}, {name}", seed, **size, settings=SIMPO | head | changes, sharpen=sharpen
        )
        for name, sharpen, changes, compared in models
        for way, head in compared.items()
    ]


def length(seed: int) -> list[Run]:
    """Does LMPO keep answers shorter than SimPO at equal accuracy, on length-biased pairs?"""
    lmpo = {"objective": "lmpo", "objective_args": {"margin_weight": 0.2}}
    arms = {"simpo": SIMPO, "lmpo, weight 0.2": SIMPO | lmpo}
    size = {"steps": 60, "pairs_per_step": 8, "measure_every": 20, "answers": 4}
    return [Run("length", arm, seed, **size, settings=settings) for arm, settings in arms.items()]


def flips(seed: int) -> list[Run]:
    """Is γ-SimPO more robust than SimPO when labels are wrong?"""
    size = {"steps": 100, "pairs_per_step": 8, "measure_every": 50}
    return [
        Run(
            *("flips", f"{objective}, {flip:.0%} flipped", seed),
            **size,
            settings=GAMMA_SIMPO | {"objective": objective, "flip": flip},
        )
        for flip in (0.0, 0.2, 0.4)
        for objective in ("simpo", "gamma-simpo")
    ]


def trees(seed: int) -> list[Run]:
    """Do pairs that are grouped by their prompt teach less than shuffled ones, step for step?"""
    size = {"steps": 100, "pairs_per_step": 12, "measure_every": 50}
    arms = {"shuffled pairs": SIMPO, "trees": SIMPO | {"group_by_prompt": True}}
    return [Run("trees", arm, seed, **size, settings=settings) for arm, settings in arms.items()]


REAL_SETTINGS = {"use_peft": True, "learning_rate": 1e-3, "group_by_prompt": True}
"""LoRA on an instruct model of 135M parameters."""


def real(seed: int) -> list[Run]:
    """On a model that can talk: the four objectives, wrong labels, the head's tail, trees.

    Each objective at its published values; SimPO at γ-SimPO's too, where the two are compared.
    """
    lmpo = {"objective": "lmpo", "objective_args": {"margin_weight": 0.2}}
    arms: dict[str, dict[str, Any]] = {
        "simpo": SIMPO,
        "lmpo": SIMPO | lmpo,
        "dpo": {"objective": "dpo", "beta": 0.1},
        "gamma-simpo": GAMMA_SIMPO | {"objective": "gamma-simpo"},
        "simpo, exact tail": SIMPO | {"head_tail": "exact"},
        "simpo, shuffled pairs": SIMPO | {"group_by_prompt": False},
    } | {
        f"{objective}, β 10, {flip:.0%} flipped": GAMMA_SIMPO
        | {"objective": objective, "flip": flip}
        for flip in (0.0, 0.2, 0.4)
        for objective in ("simpo", "gamma-simpo")
        if flip or objective == "simpo"  # the other is above
    }
    size = {"steps": 16, "pairs_per_step": 12, "measure_every": 16, "answers": 2}
    lengths = {"train_length": 256, "test_length": 256, "max_new_tokens": 128}
    return [
        Run("real", arm, seed, **size, settings=REAL_SETTINGS | settings, **lengths)
        for arm, settings in arms.items()
    ]


STUDIES = {"tail": tail, "length": length, "flips": flips, "trees": trees, "real": real}
"""By name; "real" has a model of its own."""
