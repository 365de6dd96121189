"""Rows and settings that nobody would write on purpose, and how far each gets.

A case goes as far as the preflight and one collated batch. It is sound if it gets there or ends in
a `UserError`; anything else, a library's exception above all, is a finding.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from transformers.utils.logging import disable_progress_bar
from widemargin.trainer import PreferenceConfig
from widemargin.trainer.data import tokenize_pairs
from widemargin.trainer.data.first_pair import preflight_lines
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.errors import UserError
from widemargin.trainer.objectives import OBJECTIVES
from widemargin.trainer.packing.collator import PairCollator
from widemargin.trainer.settings.files import build_config

from tests.support.chat_tokenizers import MISTRAL
from tests.support.tiny_tokenizers import tiny_tokenizer

TOKENIZERS = {
    "plain": tiny_tokenizer(None),
    "chat": tiny_tokenizer(),
    "strict": tiny_tokenizer(MISTRAL),
}

#: Settings that act outside this process (other machines, processes, devices), or on all of it.
LEFT_OUT = {
    "ddp_backend", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "local_rank",
    "push_to_hub", "hub_model_id", "hub_token", "output_dir", "report_to", "use_cpu", "debug",
    "preprocessing_num_workers", "tf32", "log_level", "log_level_replica", "torch_compile",
    "torch_compile_backend", "torch_compile_mode", "full_determinism",
}  # fmt: skip
FIELDS = sorted(
    field.name
    for field in dataclasses.fields(PreferenceConfig)
    if field.init and field.name not in LEFT_OUT
)

TEXT = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "yes", "User: hi Assistant:", "<s>", "</s>", "<|im_end|>", "\x1b[2J\x00",
         "\u202egnp", "\ud800", "{{ 7*7 }}", "{% for %}", "../../etc/passwd", "=1+1", "𝕏" * 40]
    ),
    st.text(st.characters(codec="utf-8"), max_size=20),
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), TEXT,
    st.sampled_from(["auto", "no", "none", "steps", "epoch", "1e-6", "nan", "true", "adamw_torch"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=5,
)
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {
            "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), TEXT),
            "content": TEXT,
        }
    ),
    st.dictionaries(st.sampled_from(["role", "content", "x"]), VALUES, max_size=3),
)
SIDE = st.one_of(TEXT, st.lists(MESSAGE, max_size=4), VALUES)
PLAIN = st.one_of(st.sampled_from(["Hello there.", "yes", "no, water", "Paris is far"]), TEXT)
GOOD_ROW = st.fixed_dictionaries({"prompt": PLAIN, "chosen": PLAIN, "rejected": PLAIN})
TALK = st.fixed_dictionaries(
    {name: st.lists(MESSAGE, min_size=1, max_size=4) for name in ("chosen", "rejected")}
)
ODD_ROW = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "messages", "instruction", "score"]),
    SIDE,
    max_size=5,
)
IDS = st.lists(st.integers(-2, 600), max_size=6)
ID_ROW = st.fixed_dictionaries(dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), IDS))
#: Rows of one kind mostly, since most tables have one; odd ones among them.
ROWS = st.one_of(
    *(
        st.lists(kind, min_size=1, max_size=3)
        for kind in (GOOD_ROW, GOOD_ROW, GOOD_ROW, TALK, ODD_ROW, ID_ROW)
    ),
    st.lists(st.one_of(GOOD_ROW, TALK, ODD_ROW), max_size=3),
)
DATA_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "max_length": st.sampled_from([1, 2, 5, 64, None]),
        "max_prompt_length": st.sampled_from([1, 3, 32, None]),
        "max_completion_length": st.sampled_from([1, 4, None]),
        "truncation_mode": st.sampled_from(["keep_end", "keep_start"]),
        "chat_rendering": st.sampled_from(["joint", "separate"]),
        "auto_insert_empty_system_msg": st.booleans(),
        "strict_data": st.booleans(),
        "flip": st.sampled_from([0.0, 0.5, 1.0]),
    },
)
SETTINGS = st.one_of(
    DATA_SETTINGS,
    DATA_SETTINGS,
    st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3),
    st.dictionaries(
        st.one_of(TEXT, st.sampled_from(["beta", "gamma", "lambda"])), VALUES, max_size=2
    ),
)
CASES = st.tuples(
    ROWS, SETTINGS, st.sampled_from(sorted(TOKENIZERS)), st.sampled_from([*OBJECTIVES, "nonsense"])
)


def run_case(case: tuple[Any, Any, str, str], folder: Path) -> str:
    """What became of a case: "settings", "table" or "data" refused, or "ran".

    Raises:
        Exception: whatever is not a ``UserError``.
    """
    rows, settings, tokenizer_name, objective = case
    tokenizer = TOKENIZERS[tokenizer_name]
    common = {"objective": objective, "use_cpu": True, "report_to": "none"}
    try:
        config = build_config({**common, "output_dir": str(folder), **settings})
        config.build_objective()
    except UserError:
        return "settings"
    try:
        table = Dataset.from_list(rows)
    except Exception:  # a table of one type per column is pyarrow's own to refuse, before us
        return "table"
    try:
        pairs, report = tokenize_pairs(table, tokenizer, config, vocab_size=len(tokenizer))
    except UserError:
        return "data"
    "\n".join(preflight_lines(pairs[0], tokenizer)).encode()
    assert all(line.isprintable() for line in report.lines())
    data = PairRows(pairs)
    batch = PairCollator(tokenizer.pad_token_id)(data.__getitems__(list(range(len(data)))))
    assert len(batch["pair_ids"]) == len(data)
    return "ran"


@contextmanager
def quietly() -> Iterator[None]:
    """Without progress bars, logs and warnings, of which thousands of cases make many."""
    disable_progress_bars()
    disable_progress_bar()
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def search(count: int, seed: int, folder: Path) -> Counter[str]:
    """Try ``count`` cases; how many came to each of `run_case`'s ends.

    Raises:
        Exception: of the smallest case found that ends otherwise; its notes show the case.
    """
    outcomes: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(CASES)
    def attempt(case: tuple[Any, Any, str, str]) -> None:
        outcomes[run_case(case, folder)] += 1

    with quietly():
        attempt()
    return outcomes
