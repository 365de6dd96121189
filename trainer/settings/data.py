"""Settings of the preference data."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import (
    UserError,
    expect,
    expect_bool,
    expect_number,
    expect_one_of,
    expect_whole,
    is_whole,
)

DEFAULT_SPLITS = ["train", "test"]
TRUNCATION_MODES = ("keep_end", "keep_start")
RENDERINGS = ("joint", "separate")
EDGES = ("best-vs-rest", "best-worst", "adjacent", "all", "above-gap")
PAIR_WEIGHTINGS = ("pair", "prompt")
MARGINS = ("margin", "scores", "none")
LISTS_NEED: dict[str, tuple[Any, ...]] = {
    "edges": (None, "all"),
    "group_by_prompt": (None, True),
    "pair_weighting": ("pair",),
    "margin_from": ("margin", "none"),
    "flip": (0,),
}
"""What listwise objectives leave to choose of settings that make pairs."""
SCORES = ("completion", "last_turn", "all_assistant", "answer")
COUNTS = {
    "max_length": "tokens",
    "max_prompt_length": "tokens",
    "max_completion_length": "tokens",
    "max_train_samples": "rows",
    "max_eval_samples": "rows",
    "preprocessing_num_workers": "processes",
}
"""Whole numbers from 1 on, or None, and what they count."""


@dataclass
class DataSettings:
    """Where pairs come from, how they are cut to length, and what happens to bad rows."""

    #: One data set to train on: file, folder or hub name; short for ``dataset_mixer: {it: 1.0}``.
    #: A file, or a folder of one saved table, is for training whatever its name.
    dataset: str | None = None
    #: One data set to evaluate on, in place of the evaluation splits of the training sets.
    eval_dataset: str | None = None
    #: File, folder or hub name -> fraction, 0 to 1, of each of its training splits to use, from
    #: its beginning. Evaluation splits are used in full.
    dataset_mixer: dict[str, float] = field(default_factory=dict)
    #: Splits to read. A name containing "train" is for training, every other one for evaluation.
    #: Where none contains it, the first trains, unless its name says test, val, dev or held out.
    dataset_splits: list[str] = field(default_factory=lambda: list(DEFAULT_SPLITS))
    #: Columns of the data under other names: {prompt: question, chosen: good, rejected: bad}.
    columns: dict[str, str] = field(default_factory=dict)
    #: Most tokens in prompt and completion together; None for no limit.
    max_length: int | None = 2048
    #: Most tokens in a prompt; None for no limit.
    max_prompt_length: int | None = 1800
    #: Most tokens in a completion; None for no separate limit.
    max_completion_length: int | None = None
    #: Which side of a prompt over its limit stays: "keep_end" or "keep_start". BOS always stays.
    truncation_mode: str = "keep_end"
    #: A Jinja chat template, the path of a file with one, or the name of one shipped here
    #: ("mistral", "zephyr"), in place of the tokenizer's own.
    chat_template: str | None = None
    #: Values that the chat template reads, such as {enable_thinking: false}; a row's column
    #: ``chat_template_kwargs`` goes before them.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    #: Functions, as JSON schemas, that the chat template shows in every prompt; a row's column
    #: ``tools`` goes before them.
    tools: list[dict[str, Any]] = field(default_factory=list)
    #: "joint": prompt and answer as one conversation. "separate": each answer alone, as the
    #: published SimPO, LMPO and gamma-PO scripts did, with their tokens and their truncation.
    chat_rendering: str = "joint"
    #: Tokens that count: "completion", every assistant turn after the prompt; "last_turn", only the
    #: last; "all_assistant", those of the prompt too (which then ends before the first); "answer",
    #: a completion without the reasoning between think marks. User and tool messages never count.
    score: str = "completion"
    #: The date, as 2026-01-31, that a chat template writes if it asks for today's; None for the
    #: checkpoint's in ``output_dir``, or else today's. It is kept with the run.
    chat_date: str | None = None
    #: Put an empty system message before a prompt that has none, where the template mentions
    #: "system". It keeps a template's default system prompt out.
    auto_insert_empty_system_msg: bool = False
    #: Make a row that cannot train, or whose text the chat template leaves out, an error instead
    #: of counting it.
    strict_data: bool = False
    #: Processes that tokenize; None for this one alone, with the tokenizer's own threads.
    preprocessing_num_workers: int | None = None
    #: Label noise: the probability, in [0, 1], that a training pair has its sides swapped.
    flip: float = 0.0
    #: Pairs whose prompts have the same tokens run as one tree: the prompt once, and each distinct
    #: answer once. The pairs of a prompt then share a step, as far as it has room. None: where rows
    #: have several answers.
    group_by_prompt: bool | None = None
    #: Which answers of a row with several make a pair: "best-vs-rest" (also None), "best-worst",
    #: "adjacent" in their order, "all", or "above-gap", those whose scores are ``edge_gap`` apart.
    #: Equal scores make none. Rows that have chosen and rejected too are that pair if it is None.
    edges: str | None = None
    #: The least difference of scores that makes a pair, for ``edges: above-gap``.
    edge_gap: float = 0.0
    #: What a pair's loss weighs beside a column ``weight``: "pair", every pair alike; "prompt",
    #: every prompt alike, however many pairs it has.
    pair_weighting: str = "pair"
    #: What is added to each pair's target margin: "margin", the column of that name where there is
    #: one; "scores", ``score_chosen`` minus ``score_rejected``; "none".
    margin_from: str = "margin"
    #: Shuffle the mixed data sets once before training (the order of each epoch is drawn later).
    shuffle: bool = True
    #: Seed of that shuffle and of ``flip``. 42 gives the published mixtures' order.
    mix_seed: int = 42
    #: Use at most this many rows for training, counted after the shuffle; None for all.
    max_train_samples: int | None = None
    #: Pairs that are read at a time of an ``IterableDataset`` that trains, at least: each such
    #: shard is planned as an epoch. A stream with fewer is read to its end, as a data set.
    stream_shard_size: int = 16384
    #: Use at most this many rows for evaluation, counted after the shuffle; None for all.
    max_eval_samples: int | None = None

    @property
    def takes(self) -> tuple[str, ...] | None:
        """The kinds of data that the run's objective trains on; None where there is none to ask."""
        build = getattr(self, "build_objective", None)
        try:
            return None if build is None else build().takes
        except UserError:
            return None  # whoever builds it hears the reason

    def settle_lists(self) -> None:
        """Have all answers to a prompt together where the objective ranks them."""
        if self.takes != ("scored",):
            return
        for name, values in LISTS_NEED.items():
            if getattr(self, name) not in values:
                raise UserError(
                    f"{name}: leave it out; a listwise objective ranks all answers to a prompt "
                    f"by their scores, and every prompt alike, got {getattr(self, name)!r}"
                )
        self.edges, self.group_by_prompt = "all", True

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        for each in fields(self):
            if isinstance(each.default, bool):
                expect_bool(each.name, getattr(self, each.name))
        for name, unit in COUNTS.items():
            count = getattr(self, name)
            fits = count is None or is_whole(count, 1)
            expect(name, count, fits, f"a number of {unit} from 1 on, or null")
        expect_whole("stream_shard_size", self.stream_shard_size, 1)
        expect_one_of("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        expect_one_of("chat_rendering", self.chat_rendering, RENDERINGS)
        expect_one_of("score", self.score, SCORES)
        if self.score != "completion" and self.chat_rendering == "separate":
            raise UserError(
                f"score: {self.score} needs chat_rendering: joint; set that (separate scores what "
                "the published scripts did)"
            )
        self._check_date()
        if self.group_by_prompt is not None:
            expect_bool("group_by_prompt", self.group_by_prompt)
        self._check_edges()
        expect_number("flip", self.flip, "a probability from 0 to 1", least=0, most=1)
        expect_whole("mix_seed", self.mix_seed, 0)
        self._check_mappings()
        splits = self.dataset_splits
        named = isinstance(splits, list) and all(isinstance(it, str) and it for it in splits)
        expect("dataset_splits", splits, named, "a list of split names such as [train, test]")
        if len(set(splits)) < len(splits):
            raise UserError(
                "dataset_splits: name each split once, since one either trains or evaluates; got "
                f"{splits!r}"
            )

    def _check_edges(self) -> None:
        if self.edges is not None:
            expect_one_of("edges", self.edges, EDGES)
        expect_number("edge_gap", self.edge_gap, "a number of 0 or more", least=0)
        if self.edge_gap and self.edges != "above-gap":
            given = "no edges are given" if self.edges is None else f"edges is {self.edges}"
            raise UserError(f"edge_gap: set edges: above-gap to use it; {given}")
        expect_one_of("pair_weighting", self.pair_weighting, PAIR_WEIGHTINGS)
        expect_one_of("margin_from", self.margin_from, MARGINS)

    def _check_date(self) -> None:
        try:
            self.chat_date = (
                self.chat_date and datetime.date.fromisoformat(str(self.chat_date)).isoformat()
            )
        except ValueError:
            raise UserError(
                f"chat_date: expected a date such as 2026-01-31, got {self.chat_date!r}"
            ) from None

    def _check_mappings(self) -> None:
        columns, kwargs, tools = self.columns, self.chat_template_kwargs, self.tools
        named = isinstance(columns, dict) and all(
            isinstance(name, str) for name in (*columns, *columns.values())
        )
        expected = "names here and in the data, such as {prompt: question}"
        expect("columns", columns, named, expected)
        expected = "a mapping such as {enable_thinking: false}"
        expect("chat_template_kwargs", kwargs, isinstance(kwargs, dict), expected)
        functions = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        expect("tools", tools, functions, "a list of functions as mappings")

    def settle(self, name: str, value: Any) -> None:
        """Give a setting that nobody gave what it comes to for these data."""
        setattr(self, name, value)
        vars(self).setdefault("filled_in", {})[name] = value

    def mixture(self) -> dict[str, float]:
        """The training data sets and their fractions, from ``dataset`` or ``dataset_mixer``."""
        if self.dataset and self.dataset_mixer:
            raise UserError(
                "dataset and dataset_mixer are both given; keep one (dataset: X is short for "
                "dataset_mixer: {X: 1.0})"
            )
        if self.dataset:
            return {self.dataset: 1.0}
        mixer, expected = self.dataset_mixer, "data sets and fractions, such as {data.jsonl: 1.0}"
        expect("dataset_mixer", mixer, isinstance(mixer, dict), expected)
        for name, fraction in mixer.items():
            expected = f"a fraction from 0 to 1 for {name!r}"
            expect_number("dataset_mixer", fraction, expected, least=0, most=1)
        return mixer


def divided(splits: list[str]) -> tuple[list[str], list[str]]:
    """The splits that train and those that evaluate; see `DataSettings.dataset_splits`."""
    training = [split for split in splits if "train" in split.casefold()]
    if not training:
        training = [split for split in splits[:1] if not _HELD_OUT.search(split.casefold())]
    return training, [split for split in splits if split not in training]


_HELD_OUT = re.compile("test|val|dev|held|hold")
