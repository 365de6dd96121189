"""Settings of the evaluations, and reading them from YAML files and ``--key=value`` arguments."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..data import DataSettings
from ..errors import UserError, expect, expect_number, expect_one_of, expect_whole, is_whole
from ..objectives import canonical_name, hyperparameters_of, spec_of
from ..settings.coercion import coerced, coerced_values, hints_of
from ..settings.config import PreferenceConfig
from ..settings.files import parse_overrides, read_yaml
from ..settings.names import DTYPES, PACKINGS
from ..settings.published.keys import TABLE
from ..settings.published.translation import merge, name_objective, translate

ENGINES = ("auto", "transformers", "vllm")
SECTIONS = ("alpaca_eval", "arena_hard")
BETAS = {"mean_logps": 2.0, "sum_logps": 0.1, "against_reference": 0.1}
"""Beta by kind of reward, as SimPO, CPO and DPO have it by default."""


@dataclass
class LoadSettings:
    """How to load a model that is only read."""

    #: Branch, tag or commit on the hub.
    model_revision: str = "main"
    #: Run Python code that comes with the model. Off unless you trust where it comes from.
    trust_remote_code: bool = False
    #: "float32", "bfloat16" or "float16"; None for bfloat16 on a GPU and float32 elsewhere.
    dtype: str | None = None
    #: "cuda", "cuda:1", "cpu", ...; None for the first GPU, or the CPU where there is none.
    device: str | None = None
    #: "eager", "sdpa", "flash_attention_2", ...; None for transformers' choice.
    attn_implementation: str | None = None
    #: Tokenize as tokenizer.json says, as in training.
    tokenizer_as_saved: bool = False

    def check_all(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        if self.dtype is not None:
            expect_one_of("dtype", self.dtype, DTYPES)


@dataclass
class PairSettings(LoadSettings, DataSettings):
    """How `widemargin evaluate pairs` scores; the data as in training."""

    #: Scale of the rewards in probabilities; None for the one of the config's objective, and for
    #: others what such objectives start from (2 for means, 0.1 for sums and against a reference).
    beta: float | None = None
    #: How pairs are laid out, as in training.
    packing: str = "auto"
    #: Most tokens, padding included, that are computed at once.
    max_tokens_per_batch: int = 16384

    def check_all(self) -> None:
        super().check_all()
        self.check()
        expect_whole("max_tokens_per_batch", self.max_tokens_per_batch, 1)
        expect_one_of("packing", self.packing, PACKINGS)
        if self.beta is not None:
            expect_number("beta", self.beta, "a number above 0", above=0)


@dataclass
class DecodingSettings(LoadSettings):
    """How a model answers."""

    #: A Jinja chat template, its path, or the name of one shipped; None for the tokenizer's own.
    chat_template: str | None = None
    #: A system message before each question; "" for an empty one, None for none.
    system_prompt: str | None = None
    #: Sampling temperature; 0 takes the likeliest token always.
    temperature: float = 0.0
    #: Sample among the likeliest tokens that hold this share of probability, in (0, 1].
    top_p: float = 1.0
    #: Sample among this many likeliest tokens; 0 for all.
    top_k: int = 0
    #: Most tokens in an answer.
    max_new_tokens: int = 2048
    #: Tokens that end an answer; None for the model's, the tokenizer's and the chat template's.
    stop_token_ids: list[int] | None = None
    #: Of the samples.
    seed: int = 42
    #: Questions answered at once by transformers.
    batch_size: int = 16
    #: "transformers", "vllm", or "auto": vllm where it is installed and there is a GPU.
    engine: str = "auto"

    def check_all(self) -> None:
        super().check_all()
        for option, least in (("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("seed", 0)):
            expect_whole(option, getattr(self, option), least)
        expect_number("temperature", self.temperature, "a number from 0 on", least=0)
        expect_number("top_p", self.top_p, "a share in (0, 1]", above=0, most=1)
        stops = self.stop_token_ids or []
        fits = all(is_whole(token, 0) for token in stops)
        expect("stop_token_ids", stops, fits, "token ids such as [2]")
        expect_one_of("engine", self.engine, ENGINES)


@dataclass
class AnswerSettings(DecodingSettings):
    """How a model answers a benchmark's questions."""

    #: Folder or hub name of the model; ``--model`` wins.
    model_name_or_path: str | None = None
    #: What the model is called in the files written; None for the last part of its name, or
    #: my-run-merged and my-run-checkpoint-100 for those folders of a run.
    generator: str | None = None
    #: Where the questions are, as ``--questions``, which wins; None for the benchmark's newest.
    questions: str | None = None


@dataclass
class HarnessSettings(LoadSettings):
    """How the Language Model Evaluation Harness runs."""

    #: Requests computed at once; "auto" lets the harness find out.
    batch_size: int | str = 8
    #: Examples before each question; None for the leaderboard's or the task's own number.
    num_fewshot: int | None = None
    #: Ask in the model's chat template; None as the leaderboard did: v1 never, v2 where there is
    #: one. Tasks named one by one: never.
    apply_chat_template: bool | None = None

    def check_all(self) -> None:
        super().check_all()
        if self.batch_size != "auto":
            expect_whole("batch_size", self.batch_size, 1)
        shots = self.num_fewshot
        fits = shots is None or is_whole(shots, 0)
        expect("num_fewshot", shots, fits, "a number from 0 on, or null")


Settings = TypeVar("Settings", bound=LoadSettings)


def build(kind: type[Settings], given: dict[str, Any]) -> Settings:
    """Checked settings from plain values; an unknown key is an error naming the nearest."""
    _check_known(given, hints_of(kind))
    settings = kind(**coerced_values(given, kind))
    settings.check_all()
    return settings


def answer_settings(config: str | None, section: str, overrides: list[str]) -> AnswerSettings:
    """Settings from a file of ``configs/eval``: its own keys, those of ``section``, overrides."""
    given = read_yaml(Path(config)) if config else {}
    parts = {key: given.pop(key, None) or {} for key in SECTIONS}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise UserError(f"config {config}: expected settings under {' and '.join(SECTIONS)}")
    for part in parts.values():  # a slip in the other benchmark's part is found too
        build(AnswerSettings, given | part)
    return build(
        AnswerSettings, given | parts[section] | parse_overrides(overrides, AnswerSettings)
    )


def pair_settings(
    config: str | None, dataset: str | None, split: str | None, overrides: list[str]
) -> tuple[PairSettings, dict[str, float]]:
    """The data settings of a training YAML with ``overrides``, and beta by kind of reward.

    Of the YAML's other settings, beta counts, for the kind of reward its objective has. Training's
    label noise and limits do not.
    """
    betas = dict(BETAS)
    given = _from_training(config, betas) if config else {}
    overriding = translate(parse_overrides(overrides, PairSettings), [])
    given = merge(given, overriding)
    if dataset is not None:
        for key in ("dataset_mixer", "eval_dataset", "dataset"):
            given.pop(key, None)
        given["dataset"] = dataset
    if split is not None:
        given["dataset_splits"] = [split]
        if dataset is None:
            given.pop("eval_dataset", None)
    settings = build(PairSettings, given)
    if settings.beta is not None:
        betas = dict.fromkeys(betas, settings.beta)
    return settings, betas


def _from_training(config: str, betas: dict[str, float]) -> dict[str, Any]:
    """The data settings in a training YAML; its beta goes to ``betas``."""
    given = name_objective(translate(read_yaml(Path(config)), []), "simpo", [])
    objective = canonical_name(given["objective"])
    hyperparameters = hyperparameters_of(objective)
    known = {field.name for field in fields(PreferenceConfig)} | hyperparameters.keys()
    _check_known([key for key in given if key not in TABLE], known, f"config {config}: ")
    arguments = given.get("objective_args") or {}
    beta = given.get("beta", arguments.get("beta"))
    if beta is None and "beta" in hyperparameters:
        beta = hyperparameters["beta"].default
        beta = beta if isinstance(beta, float) else None
    if beta is not None:
        betas[_kind(objective)] = coerced("beta", beta, float)
    data = {field.name for field in fields(DataSettings)} - {"max_train_samples"}
    return {key: value for key, value in given.items() if key in data}


def _kind(objective: str) -> str:
    """The reward that an objective compares answers by."""
    if spec_of(objective).needs_reference:
        return "against_reference"
    length_norm = hyperparameters_of(objective).get("length_norm")
    return "mean_logps" if length_norm is None or length_norm.default else "sum_logps"


def _check_known(keys: Iterable[str], known: Collection[str], where: str = "") -> None:
    """Raise ``UserError`` for a key that is none of ``known``, with the nearest of them."""
    for key in keys:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise UserError(f"{where}unknown setting {key!r}; did you mean {nearest!r}?")
