"""Data sets as a whole: label noise, counts, the cache, templates, real pairs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.data import (
    DataReport,
    DataSettings,
    SplitReport,
    caching,
    is_tokenized,
    load_pairs,
    tokenize_pairs,
    tokenizing,
)
from widemargin.trainer.data.limits import MISMATCH, NO_PROMPT_TOKEN, Limits
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import Row, make_rows, names, write
from tests.support.tiny_tokenizers import (
    MERGING,
    NO_SYSTEM,
    WITH_BOS,
    WITHOUT_BOS,
    WITHOUT_END,
    tiny_tokenizer,
)

SHARED_DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


pytestmark = pytest.mark.usefixtures("own_cache")


def test_flip_swaps_a_seeded_share_of_training_pairs_only() -> None:
    raw, tokenizer = Dataset.from_list(make_rows(400)), tiny_tokenizer()
    plain, _ = tokenize_pairs(raw, tokenizer)
    noisy, report = tokenize_pairs(raw, tokenizer, DataSettings(flip=0.25))
    again, _ = tokenize_pairs(raw, tokenizer, DataSettings(flip=0.25))
    other, _ = tokenize_pairs(raw, tokenizer, DataSettings(flip=0.25, mix_seed=1))
    kept, _ = tokenize_pairs(raw, tokenizer, DataSettings(flip=0.25), training=False)
    assert kept[:] == plain[:]
    assert noisy[:] == again[:] != other[:]
    assert noisy["pair_id"][:] == list(range(400))
    swapped = [a["chosen_ids"] == b["rejected_ids"] for a, b in zip(noisy, plain, strict=True)]
    assert sum(swapped) == report.flipped
    assert 60 < report.flipped < 140
    for was, now, swap in zip(plain, noisy, swapped, strict=True):
        sides = (
            (was["rejected_ids"], was["chosen_ids"])
            if swap
            else (was["chosen_ids"], was["rejected_ids"])
        )
        assert (now["prompt_ids"], now["chosen_ids"], now["rejected_ids"]) == (
            was["prompt_ids"],
            *sides,
        )
    everything, _ = tokenize_pairs(raw, tokenizer, DataSettings(flip=1))
    assert everything["chosen_ids"][:] == plain["rejected_ids"][:]


def test_bad_rows_are_counted_shown_and_survive_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*make_rows(3), {"prompt": "a", "chosen": "", "rejected": "\x1b[31m"}]
    rows += [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4 + make_rows(1, 3)
    raw = Dataset.from_list(rows)
    pairs, report = tokenize_pairs(raw, tiny_tokenizer(), name="mine")
    assert names(pairs) == [0, 1, 2, 3]
    assert pairs["pair_id"][:] == [0, 1, 2, 3]
    assert report.skipped == {"identical sides": 4, "empty completion": 1}
    assert report.examples[0] == "row 3 of mine: empty completion (chosen is empty)"
    lines = DataReport(train=report).lines()
    assert lines[0] == "train: 4 pairs of 9 rows, 5 skipped"
    assert "    ... and 2 more" in lines
    monkeypatch.setattr(tokenizing.PairTokenizer, "__call__", lambda *_: pytest.fail("tokenized"))
    _, cached = tokenize_pairs(raw, tiny_tokenizer(), name="mine")
    assert cached == report
    json.dumps(DataReport(train=report).as_dict())


def test_strict_data_names_the_row_and_nothing_left_gives_the_counts() -> None:
    bad = {"prompt": "a", "chosen": "b", "rejected": "b"}
    raw = Dataset.from_list([*make_rows(2), bad])
    with pytest.raises(
        UserError, match=r"row 2 of mine: identical sides .* of 3 rows, 1 identical"
    ):
        tokenize_pairs(raw, tiny_tokenizer(), DataSettings(strict_data=True), name="mine")
    with pytest.raises(UserError, match=r"none of 2 rows can train \(2 identical sides\); row 0"):
        tokenize_pairs(Dataset.from_list([bad, bad]), tiny_tokenizer())
    with pytest.raises(UserError, match="no rows"):
        tokenize_pairs(raw.select([]), tiny_tokenizer())


def test_ids_past_the_vocabulary_are_an_error_in_whole() -> None:
    raw = Dataset.from_list(make_rows(2))
    pairs, _ = tokenize_pairs(raw, tiny_tokenizer(), vocab_size=400)
    largest = max(max(ids) for name in tokenizing.TOKEN_COLUMNS for ids in pairs[name])
    tokenize_pairs(raw, tiny_tokenizer(), vocab_size=largest + 1)
    with pytest.raises(UserError, match=f"exceed the model's vocabulary: .* token id {largest}"):
        tokenize_pairs(raw, tiny_tokenizer(), vocab_size=largest)


def test_tokenized_data_is_recognised_checked_and_cut() -> None:
    raw = Dataset.from_list(make_rows(4))
    pairs, _ = tokenize_pairs(raw, tiny_tokenizer())
    assert is_tokenized(pairs)
    assert not is_tokenized(raw)
    assert not is_tokenized([1, 2])
    again, _ = tokenize_pairs(pairs, tiny_tokenizer())
    assert again[:] == pairs[:]
    ids = Dataset.from_dict(
        {
            "prompt_ids": [[1, 2], [], [1]],
            "chosen_ids": [[4] * 9] * 3,
            "rejected_ids": [[5], [5], [-5]],
        }
    )
    cut, report = tokenize_pairs(ids, tiny_tokenizer(), DataSettings(max_length=5))
    assert cut["chosen_ids"][:] == [[4] * 3]
    assert report.skipped == {NO_PROMPT_TOKEN: 1, "wrong type": 1}


def test_cache_key_is_content() -> None:
    raw = Dataset.from_list(make_rows(5))
    limits = Limits(9, 5, None, "keep_end")

    def key(tokenizer: Any = None, data: Dataset = raw, at: Limits = limits) -> str:
        return caching.fingerprint(data, tokenizer or tiny_tokenizer(), at)

    used = tiny_tokenizer()
    used(["a b", "c"], padding=True, truncation=True, max_length=1)
    assert key() == key() == key(used) == key(data=Dataset.from_list(make_rows(5)))
    grown = tiny_tokenizer()
    grown.add_tokens(["<new>"])
    others = {
        key(tiny_tokenizer(WITHOUT_BOS)),
        key(tiny_tokenizer(adds_bos=False)),
        key(grown),
        key(data=Dataset.from_list(make_rows(6))),
        key(at=dataclasses.replace(limits, max_length=8)),
        key(at=dataclasses.replace(limits, truncation_mode="keep_start")),
    }
    assert len(others) == 6
    assert key() not in others


@pytest.mark.costly
def test_cache_key_is_the_same_in_another_process(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    Dataset.from_list(make_rows(5)).save_to_disk(tmp_path / "raw")
    program = (
        "import sys; from datasets import load_from_disk; from transformers import AutoTokenizer\n"
        "from widemargin.trainer.data import caching, limits as sizes\n"
        "limits = sizes.Limits(9, 5, None, 'keep_end')\n"
        "raw = load_from_disk(sys.argv[1] + '/raw')\n"
        "key = caching.fingerprint(raw, AutoTokenizer.from_pretrained(sys.argv[1]), limits)\n"
        "print('key', key)\n"
    )

    def key(hash_seed: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(tmp_path)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    first, second = (process.communicate()[0] for process in (key("1"), key("2")))
    assert first == second
    assert first.startswith("key ")


def test_processes_that_arrive_together_tokenize_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tokenize = tokenizing.PairTokenizer.__call__

    def slow(self: Any, batch: Any) -> Any:
        calls.append(1)
        time.sleep(0.3)
        return tokenize(self, batch)

    monkeypatch.setattr(tokenizing.PairTokenizer, "__call__", slow)
    raw = Dataset.from_list(make_rows(9, 1000))
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: tokenize_pairs(raw, tiny_tokenizer())[0][:], range(3)))
    assert done[0] == done[1] == done[2]
    assert len(calls) == 1


def test_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tokenize = tokenizing.PairTokenizer.__call__

    def counted(self: Any, batch: Any) -> Any:
        calls.append(1)
        return tokenize(self, batch)

    monkeypatch.setattr(tokenizing.PairTokenizer, "__call__", counted)
    setting = DataSettings(write(tmp_path / "a.jsonl", make_rows(7)))
    first = load_pairs(setting, tiny_tokenizer())
    second = load_pairs(setting, tiny_tokenizer(), vocab_size=400)
    assert len(calls) == 1
    assert first.train is not None
    assert second.train is not None
    assert (first.train[:], first.report) == (second.train[:], second.report)
    load_pairs(dataclasses.replace(setting, max_length=7), tiny_tokenizer())
    load_pairs(setting, tiny_tokenizer(WITHOUT_BOS))
    write(tmp_path / "a.jsonl", make_rows(8))
    assert names(load_pairs(setting, tiny_tokenizer()).train) != names(first.train)
    assert len(calls) == 4


def test_workers_give_the_same_pairs() -> None:
    raw = Dataset.from_list(make_rows(50))
    alone, _ = tokenize_pairs(raw.select(range(49)), tiny_tokenizer())
    shared, _ = tokenize_pairs(raw, tiny_tokenizer(), DataSettings(preprocessing_num_workers=2))
    assert shared[:49] == alone[:]


def test_chat_template_setting(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "?"}]
    row = {"prompt": ask, "chosen": "yes", "rejected": "no"}
    raw = Dataset.from_list([row])
    (tmp_path / "chat.jinja").write_text(MERGING)
    for value in (MERGING, str(tmp_path / "chat.jinja")):
        tokenizer = tiny_tokenizer(None)
        _, report = tokenize_pairs(raw, tokenizer, DataSettings(chat_template=value))
        assert tokenizer.chat_template == MERGING
        assert report.flags == {MISMATCH: 1}
        assert report.mismatches[0].startswith("row 0 of train_dataset: the last 1 of")
    with pytest.raises(UserError, match="neither a Jinja template"):
        tokenize_pairs(raw, tiny_tokenizer(), DataSettings(chat_template="chatml"))
    with pytest.raises(UserError, match="has no chat template; set chat_template:"):
        tokenize_pairs(raw, tiny_tokenizer(None))


def test_notes_tell_what_is_unusual_about_a_template(tmp_path: Path) -> None:
    setting = DataSettings(write(tmp_path / "a.jsonl", make_rows(2)), dataset_splits=["train"])

    def notes(template: str, adds_bos: bool = True) -> str:
        return " ".join(load_pairs(setting, tiny_tokenizer(template, adds_bos)).report.notes)

    assert notes(WITH_BOS) == notes(NO_SYSTEM) == notes(WITHOUT_BOS, adds_bos=False) == ""
    assert "the chat template writes none" in notes(WITHOUT_BOS)
    assert "learnt without an end" in notes(WITHOUT_END)


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.none() | st.sampled_from(["user", "assistant"]), "content": st.none() | TEXT}
    ),
    max_size=3,
)
COLUMNS = (st.none() | TEXT, st.none() | MESSAGES)
TABLES = st.tuples(st.sampled_from(COLUMNS), st.sampled_from(COLUMNS)).flatmap(
    lambda kinds: st.lists(
        st.fixed_dictionaries({"chosen": kinds[0], "rejected": kinds[0], "prompt": kinds[1]}),
        min_size=1,
        max_size=5,
    )
)


@pytest.mark.costly
@settings(max_examples=40, deadline=None)
@given(
    table=TABLES,
    length=st.integers(1, 12),
)
def test_any_data_set_gives_pairs_or_one_of_our_errors(table: list[Row], length: int) -> None:
    setting = DataSettings(max_length=length, max_prompt_length=length)
    done: tuple[Dataset, SplitReport] | str
    try:
        done = tokenize_pairs(Dataset.from_list(table), tiny_tokenizer(), setting)
    except UserError as error:
        done = str(error)
    if isinstance(done, str):
        assert "\n" not in done
        return
    pairs, report = done
    assert len(pairs) == report.pairs == len(table) - sum(report.skipped.values())
    assert all(line.isprintable() for line in report.lines())


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="../shared/data is not here")
def test_real_pairs_with_a_real_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED_DATA / "small_lm")
    setting = DataSettings(str(SHARED_DATA), max_train_samples=200)
    data = load_pairs(setting, tokenizer, vocab_size=32000)
    assert data.train is not None
    assert data.evaluation is not None
    assert (len(data.train), len(data.evaluation)) == (200, 400)
    ends = [ids[-1] for ids in data.evaluation["chosen_ids"]]
    assert np.mean(np.array(ends) == tokenizer.convert_tokens_to_ids("<|end|>")) > 0.97
    raw = load_dataset(
        "json", data_files=str(SHARED_DATA / "judged_pairs_test.jsonl.gz"), split="train"
    ).shuffle(seed=42)
    for i in range(3):
        messages = raw[i]["prompt"] + raw[i]["chosen"]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        ours = data.evaluation[i]["prompt_ids"] + data.evaluation[i]["chosen_ids"]
        assert tokenizer.decode(whole[len(ours) :]) == "\n"
        assert ours == whole[: len(ours)]
