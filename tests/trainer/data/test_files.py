"""Files as people have them: kinds, splits in any case, and what is said of damaged ones."""

from __future__ import annotations

import json
import os
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet
from widemargin.trainer.data import DataSettings, load_pairs
from widemargin.trainer.data.formats.damage import cache_trouble, nests_too_deeply
from widemargin.trainer.data.formats.files import load_files
from widemargin.trainer.data.limits import TEXT_LOST
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import bot, make_rows, names, user, write
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


def loaded(path, **settings):
    return load_pairs(DataSettings(str(path), shuffle=False, **settings), tiny_tokenizer())


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_tables_of_text_keep_their_texts(tmp_path, ending, separator):
    rows = [["prompt", "chosen", "rejected"], ["a", "NA", "42"], ["b", "null", "7"]]
    path = tmp_path / f"pairs.{ending}"
    path.write_text("".join(separator.join(row) + "\n" for row in rows))
    data = loaded(path)
    assert names(data.train) == [42, 7]
    chosen = [str(tiny_tokenizer().decode(ids)) for ids in data.train["chosen_ids"]]
    assert chosen == ["NA</s>", "null</s>"]


def test_zstd(tmp_path):
    path = tmp_path / "pairs.jsonl.zst"
    text = "".join(json.dumps(row) + "\n" for row in make_rows(3)).encode()
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
        file.write(text)
    assert names(loaded(path).train) == [0, 1, 2]


def test_split_names_in_any_case(tmp_path):
    write(tmp_path / "Train.jsonl", make_rows(3))
    write(tmp_path / "TEST.jsonl", make_rows(2, 10))
    write(tmp_path / "holdout.jsonl", make_rows(2, 20))
    data = loaded(tmp_path)
    assert (names(data.train), names(data.evaluation)) == ([0, 1, 2], [10, 11])
    assert "no split of dataset_splits reads holdout.jsonl" in data.report.notes[0]


@pytest.mark.parametrize(
    "files", [("good.jsonl", "held_out.jsonl"), ("a_train.jsonl", "b_train.jsonl")]
)
def test_several_files_do_not_become_one_split(tmp_path, files):
    for file in files:
        write(tmp_path / file, make_rows(2))
    with pytest.raises(UserError, match=f"all of {', '.join(files)} would become one split"):
        loaded(tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_text_that_is_not_utf8_is_named_by_file_and_line(tmp_path, ending):
    good = {"jsonl": json.dumps(make_rows(1)[0]), "csv": "prompt,chosen,rejected\na,b,c"}[ending]
    path = tmp_path / f"pairs.{ending}"
    path.write_bytes(f"{good}\n{good.replace('a', 'é')}\n".encode("latin-1"))
    with pytest.raises(UserError, match=rf"pairs\.{ending}, line \d.* is not UTF-8 \(byte 0xe9"):
        loaded(path)


def test_parquet_that_is_not_utf8_is_named_by_row(tmp_path):
    text = pa.array([b"a", b"caf\xe9"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, text.buffers())
    side = pa.array(["b", "c"])
    table = pa.table({"prompt": column, "chosen": side, "rejected": pa.array(["d", "e"])})
    path = tmp_path / "pairs.parquet"
    parquet.write_table(table, path)
    with pytest.raises(UserError, match=r"pairs\.parquet'.*row 1 is not UTF-8"):
        loaded(path)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]")])
def test_empty_files_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} is empty"):
        loaded(tmp_path / name)


def test_broken_json_is_named_by_line(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(make_rows(1)[0]) + '\n{"prompt": \n')
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 2 \(row 1\), is not JSON"):
        loaded(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize("orient", ["columns", "list"])
def test_a_file_of_columns_is_refused_with_the_remedy(tmp_path, orient):
    table: Any = Dataset.from_list(make_rows(2)).to_pandas()
    columns = json.loads(table.to_json()) if orient == "columns" else table.to_dict("list")
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(columns))
    with pytest.raises(UserError, match="orient='records'"):
        loaded(path)
    table.to_json(path, orient="records", lines=True)
    assert len(loaded(path).train) == 2


def test_a_subset_stands_after_a_colon(monkeypatch):
    asked = []

    def give(name, config=None):
        asked.append((name, config))
        return {"train": datasets.Dataset.from_list(make_rows(2))}

    monkeypatch.setattr(datasets, "load_dataset", give)
    assert names(loaded("owner/data:easy").train) == [0, 1]
    assert asked == [("owner/data", "easy")]


@pytest.mark.parametrize(
    "text",
    [
        "prompt;chosen;rejected\na;yes, it is;0\n",
        ",prompt,chosen,rejected\n7,a,yes,0\n",
        '\ufeffprompt,chosen,rejected\r\n"a ""b"",\n c"," yes"," 0"\r\n',
    ],
    ids=["semicolons", "pandas' index", "quotes"],
)
def test_tables_as_spreadsheets_and_pandas_write_them(tmp_path, text):
    path = tmp_path / "pairs.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert names(loaded(path).train) == [0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt,chosen,rejected\na,yes,no\na,yes, it is,no\n", "line 3, has 4 values for 3"),
        ("prompt,chosen,rejected\n", "has no rows"),
    ],
)
def test_a_table_that_would_be_read_otherwise_than_meant_is_refused(tmp_path, text, reason):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        loaded(path)


def test_messages_in_a_table_that_pandas_wrote(tmp_path):
    pair = {"prompt": [user("wet?")], "chosen": [bot("it's 'so'")], "rejected": [bot("0")]}
    path = tmp_path / "pairs.csv"
    frame: Any = Dataset.from_list([pair]).to_pandas()
    frame.to_csv(path)
    expected = load_pairs(
        DataSettings(write(tmp_path / "pairs.jsonl", [pair])), tiny_tokenizer()
    ).train
    assert loaded(path).train["chosen_ids"][0] == expected["chosen_ids"][0]


def test_rows_of_several_types_in_one_file(tmp_path):
    talk = {"prompt": [user("wet?")], "chosen": [bot("yes")], "rejected": [bot("0")]}
    calls = [{"type": "function", "function": {"name": "f", "arguments": {key: 1}}} for key in "ab"]
    called = [talk | {"chosen": [bot("yes") | {"tool_calls": [call]}]} for call in calls]
    mixed = [talk, talk | {"prompt": "wet?"}, {"prompt": "wet?", "chosen": "yes", "rejected": "no"}]
    data = loaded(write(tmp_path / "pairs.jsonl", mixed))
    assert len(data.train) == 3
    assert data.train["prompt_ids"][0] == data.train["prompt_ids"][1]
    data = loaded(write(tmp_path / "calls.jsonl", called))
    assert data.report.train.flags == {TEXT_LOST: 2}


@pytest.mark.parametrize(
    ("text", "deep"),
    [
        pytest.param("[" * 5000, True, id="lists"),
        pytest.param('[{"a":' * 3000, True, id="mixed"),
        pytest.param(json.dumps({"prompt": "[" * 5000}), False, id="brackets in text"),
        pytest.param('{"a": [{"b": "\\"["}]}\n' * 5000, False, id="many rows"),
    ],
)
def test_files_nested_so_deeply_that_readers_crash(text, deep, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    assert nests_too_deeply(str(path)) is deep
    (tmp_path / "null.json").write_text("null")
    with pytest.raises(UserError, match="begins with no row"):
        load_files("pairs", [str(tmp_path / "null.json")])
    if deep:
        with pytest.raises(UserError, match=r"nested too deeply|begins with no row"):
            load_files("pairs", [str(path)])


def test_bad_text_in_the_first_row_of_messages_is_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    pair = {"prompt": [user("caf?")], "chosen": [bot("yes")], "rejected": [bot("no")]}
    path.write_bytes(json.dumps(pair).encode().replace(b"caf?", b"caf\xe9"))
    with pytest.raises(UserError, match=r"pairs.jsonl, line 1 \(row 0\), is not UTF-8"):
        loaded(path)


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    with pytest.raises(UserError, match=r"pairs.jsonl.*set HF_HOME to a folder"):
        loaded(path)


def test_a_cache_in_a_home_that_is_closed_to_us_is_said(tmp_path, monkeypatch):
    """As /root is to a container's user, where even looking for a file is refused."""
    status = os.stat

    def closed(path, *args, **kwargs):
        if str(path).startswith(f"{tmp_path}{os.sep}"):
            raise PermissionError(13, "Permission denied", str(path))
        return status(path, *args, **kwargs)

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / ".cache" / "datasets")
    monkeypatch.setattr(os, "stat", closed)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_trouble().startswith("set HF_HOME to a folder")
