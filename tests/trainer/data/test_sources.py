"""Sources, splits and mixtures; what is said of those that are wrong; the settings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from widemargin.trainer import data
from widemargin.trainer.data import DataSettings, load_pairs, tokenize_pairs
from widemargin.trainer.data.table import PairRows
from widemargin.trainer.errors import UserError

from tests.support.pair_rows import Row, make_rows, names, write
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")


def test_the_first_split_trains_where_no_name_says_train(tmp_path: Path) -> None:
    """As those of MT-Bench's judgments and of Tulu 2.5's preferences."""
    for place, split in enumerate(("human", "gpt4_pair")):
        write(tmp_path / f"{split}.jsonl", make_rows(2, 10 * place))
    settings = DataSettings(str(tmp_path), dataset_splits=["human", "gpt4_pair"], shuffle=False)
    data = load_pairs(settings, tiny_tokenizer())
    assert (names(data.train), names(data.evaluation)) == ([0, 1], [10, 11])
    held_out = write(tmp_path / "validation.jsonl", make_rows(1))
    settings = DataSettings(str(Path(held_out).parent), dataset_splits=["validation"])
    assert load_pairs(settings, tiny_tokenizer()).train is None


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet"])
def test_files(tmp_path: Path, ending: str) -> None:
    train = write(tmp_path / f"pairs{ending}", make_rows(3))
    test = write(tmp_path / f"others{ending}", make_rows(2, 10))
    data = load_pairs(DataSettings(train, test, shuffle=False), tiny_tokenizer())
    assert names(data.train) == [0, 1, 2]
    assert names(data.evaluation) == [10, 11]


def _saved_dict(folder: Path) -> None:
    train, test = Dataset.from_list(make_rows(3)), Dataset.from_list(make_rows(2, 10))
    DatasetDict([("train", train), ("test", test)]).save_to_disk(folder)


def _saved_splits(folder: Path) -> None:
    Dataset.from_list(make_rows(3)).save_to_disk(folder / "train")
    Dataset.from_list(make_rows(2, 10)).save_to_disk(folder / "test")


def _split_files(folder: Path) -> None:
    write(folder / "train.jsonl", make_rows(3))
    write(folder / "pairs_test.parquet", make_rows(2, 10))
    (folder / "config.json").write_text("{}")


def _shards(folder: Path) -> None:
    write(folder / "train-00000-of-00002.parquet", make_rows(1))
    write(folder / "train-00001-of-00002.parquet", make_rows(2, 1))
    write(folder / "test-00000-of-00001.parquet", make_rows(2, 10))


def _hub_clone(folder: Path) -> None:
    write(folder / "data" / "train-00000-of-00001.parquet", make_rows(3))
    write(folder / "data" / "test-00000-of-00001.parquet", make_rows(2, 10))


@pytest.mark.parametrize("make", [_saved_dict, _saved_splits, _split_files, _shards, _hub_clone])
def test_folders(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "data")
    data = load_pairs(DataSettings(str(tmp_path / "data"), shuffle=False), tiny_tokenizer())
    assert names(data.train) == [0, 1, 2]
    assert names(data.evaluation) == [10, 11]


def test_mixture_takes_heads_and_shuffles_as_datasets_does(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, start in ((a, 0), (b, 100)):
        write(folder / "train_prefs.jsonl", make_rows(20, start))
        write(folder / "test_prefs.jsonl", make_rows(4, start + 50))
    mixture = DataSettings(
        dataset_mixer={str(a): 0.5, str(b): 0.26}, dataset_splits=["train_prefs", "test_prefs"]
    )
    data = load_pairs(mixture, tiny_tokenizer())
    heads = Dataset.from_dict({"x": [*range(10), *range(100, 105)]})
    tests = Dataset.from_dict({"x": [*range(50, 54), *range(150, 154)]})
    assert names(data.train) == list(heads.shuffle(seed=42)["x"])
    assert names(data.evaluation) == list(tests.shuffle(seed=42)["x"])
    few = dataclasses.replace(mixture, max_train_samples=4, max_eval_samples=3)
    fewer = load_pairs(few, tiny_tokenizer())
    assert names(fewer.train) == names(data.train)[:4]
    assert names(fewer.evaluation) == names(data.evaluation)[:3]
    assert fewer.train is not None
    assert [row["pair_id"] for row in PairRows(fewer.train).__getitems__(range(4))] == [0, 1, 2, 3]
    assert data.report.train is not None
    assert str(data.report.train.sources[1]) == f"{b} [train_prefs]: 5 of 20 rows"


def test_sources_of_different_formats_mix(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "?"}]
    chat = {
        "chosen": [*ask, {"role": "assistant", "content": "yes"}],
        "rejected": [*ask, {"role": "assistant", "content": "no"}],
        "score": 1.0,
    }
    a, b = write(tmp_path / "a.jsonl", make_rows(2)), write(tmp_path / "b.jsonl", [chat])
    none = DataSettings(dataset_mixer={a: 1.0, b: 1.0, write(tmp_path / "c.jsonl", [chat]): 0.0})
    data = load_pairs(none, tiny_tokenizer())
    assert data.train is not None
    assert len(data.train) == 3
    assert data.train.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]


def test_missing_evaluation_split_is_noted_by_default_and_an_error_when_asked_for(
    tmp_path: Path,
) -> None:
    write(tmp_path / "train.jsonl", make_rows(2))
    data = load_pairs(DataSettings(str(tmp_path)), tiny_tokenizer())
    assert data.evaluation is None
    assert "has no split to evaluate on (found: train)" in data.report.notes[0]
    with pytest.raises(UserError, match=r"no split 'valid' \(found: train\)"):
        load_pairs(DataSettings(str(tmp_path), dataset_splits=["train", "valid"]), tiny_tokenizer())
    splits = ["train_prefs", "train"]
    with pytest.raises(UserError, match=r"no split 'train_prefs' \(found: train\)"):
        load_pairs(DataSettings(str(tmp_path), dataset_splits=splits), tiny_tokenizer())


def one_line_error(setting: DataSettings) -> str:
    with pytest.raises(UserError) as caught:
        load_pairs(setting, tiny_tokenizer())
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_errors_about_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("./no", "/no/such", "no.jsonl", "~/no", "a/b/c", "no.parquet"):
        assert f"{name!r}: no such file or folder" in one_line_error(DataSettings(name))

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nnetwork")

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", unreachable)
        message = one_line_error(DataSettings("someone/pairs"))
    assert re.search("'someone/pairs': it is no local file or folder, and the hub did", message)
    wrong = write(tmp_path / "wrong.jsonl", [{"question": "a", "answer": "b"}])
    message = one_line_error(DataSettings(wrong))
    assert "has the columns question, answer; expected prompt, chosen and rejected" in message
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", \n')
    assert "cannot be read" in one_line_error(DataSettings(str(tmp_path / "broken.jsonl")))
    (tmp_path / "notes.txt").write_text("?")
    assert "expected files of one kind" in one_line_error(DataSettings(str(tmp_path / "notes.txt")))
    (tmp_path / "empty").mkdir()
    assert "has no files named as the splits" in one_line_error(
        DataSettings(str(tmp_path / "empty"))
    )
    assert "no data: set dataset:" in one_line_error(DataSettings())
    with pytest.raises(UserError, match=r"expected a datasets\.Dataset, got list"):
        tokenize_pairs([{"prompt": "a"}], tiny_tokenizer())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_length": 0}, "max_length"),
        ({"max_prompt_length": "9"}, "max_prompt_length"),
        ({"max_completion_length": True}, "max_completion_length"),
        ({"max_train_samples": -1}, "max_train_samples"),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers"),
        ({"truncation_mode": "middle"}, "truncation_mode"),
        ({"flip": 1.5}, "flip"),
        ({"flip": float("nan")}, "flip"),
        ({"mix_seed": -1}, "mix_seed"),
        ({"dataset_splits": "train"}, "dataset_splits"),
        ({"dataset_splits": ["train", "train"]}, "dataset_splits: name each split once"),
        ({"dataset": "a", "dataset_mixer": {"b": 1.0}}, "dataset and dataset_mixer"),
        ({"dataset_mixer": {"b": 1.5}}, "dataset_mixer"),
        ({"dataset_mixer": ["b"]}, "dataset_mixer"),
    ],
)
def test_settings_out_of_range(values: Row, named: str) -> None:
    assert one_line_error(DataSettings(**values)).startswith(named)


def test_every_setting_is_read() -> None:
    trainer = Path(str(data.__file__)).parents[1]
    files = [*sorted((trainer / "data").glob("*.py")), trainer / "settings" / "data.py"]
    source = "".join(file.read_text() for file in files)
    for field in dataclasses.fields(DataSettings):
        assert re.search(rf"(self|settings)\.{field.name}\b", source), field.name


def test_no_row_and_no_index_names_a_file_or_a_host(tmp_path: Path) -> None:
    """An image's cell, a folder's README.md and a saved folder's state.json could."""
    import json

    from datasets import Dataset, Features, Image, Value

    rows = make_rows(3)
    (tmp_path / "secret.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Value("string")
    cells = [{"bytes": None, "path": "/etc/passwd"}] * 3
    columns = {"prompt": cells, "chosen": ["a"] * 3, "rejected": ["b"] * 3}
    for kind in (Image(), [Image()]):
        data = columns if isinstance(kind, Image) else columns | {"prompt": [[c] for c in cells]}
        features = Features({"prompt": kind, "chosen": text, "rejected": text})
        Dataset.from_dict(data, features).to_parquet(tmp_path / "images.parquet")
        with pytest.raises(UserError, match="prompt is of the kind Image"):
            load_pairs(DataSettings(dataset=str(tmp_path / "images.parquet")), tiny_tokenizer())

    folder = tmp_path / "folder"
    folder.mkdir()
    for named in ("../secret.jsonl", "http://127.0.0.1:9/x.jsonl"):
        (folder / "README.md").write_text(
            f'---\nconfigs:\n- config_name: default\n  data_files: "{named}"\n---\n'
        )
        with pytest.raises(UserError, match="no data files"):
            load_pairs(DataSettings(dataset=str(folder)), tiny_tokenizer())

    for name in ("saved", "other"):
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
    state = json.loads((tmp_path / "saved/state.json").read_text())
    state["_data_files"] = [{"filename": "../other/data-00000-of-00001.arrow"}]
    (tmp_path / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="not a file in its folder"):
        load_pairs(DataSettings(dataset=str(tmp_path / "saved")), tiny_tokenizer())
