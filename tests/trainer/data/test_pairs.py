"""Data sets from end to end: label noise, errors, worker processes, real pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from widemargin.trainer.data import DataSettings, SplitReport, load_pairs, tokenize_pairs
from widemargin.trainer.data.table import TOKEN_COLUMNS, PairRows
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import Row, make_rows
from tests.support.tiny_tokenizers import tiny_tokenizer

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
    assert [row["pair_id"] for row in PairRows(noisy).__getitems__(range(400))] == list(range(400))
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
    largest = max(max(ids) for name in TOKEN_COLUMNS for ids in pairs[name])
    tokenize_pairs(raw, tiny_tokenizer(), vocab_size=largest + 1)
    with pytest.raises(UserError, match=f"exceed the model's vocabulary: .* token id {largest}"):
        tokenize_pairs(raw, tiny_tokenizer(), vocab_size=largest)


def test_workers_give_the_same_pairs() -> None:
    raw = Dataset.from_list(make_rows(50))
    alone, _ = tokenize_pairs(raw.select(range(49)), tiny_tokenizer())
    shared, _ = tokenize_pairs(raw, tiny_tokenizer(), DataSettings(preprocessing_num_workers=2))
    assert shared[:49] == alone[:]


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
