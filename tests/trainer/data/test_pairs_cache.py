"""The cache of tokens: what its key depends on, and who tokenizes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from widemargin.trainer.data import DataSettings, load_pairs, tokenize_pairs
from widemargin.trainer.data.cached import fingerprint
from widemargin.trainer.data.chat import Rendering
from widemargin.trainer.data.encoding import PairTokenizer
from widemargin.trainer.data.limits import Limits

from tests.support.chat_tokenizers import family_tokenizer
from tests.support.pair_rows import make_rows, names, write
from tests.support.tiny_tokenizers import WITHOUT_BOS, tiny_tokenizer
from tests.support.tokenized_rows import LOOSE, SAME_PAIR

pytestmark = pytest.mark.usefixtures("own_cache")


def test_cache_key_is_content() -> None:
    raw = Dataset.from_list(make_rows(5))
    limits = Limits(9, 5, None, "keep_end")

    def key(tokenizer: Any = None, data: Dataset = raw, at: Limits = limits) -> str:
        return fingerprint(data, tokenizer or tiny_tokenizer(), at)

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
    """Which hashes strings otherwise."""
    tiny_tokenizer().save_pretrained(tmp_path)
    Dataset.from_list(make_rows(5)).save_to_disk(tmp_path / "raw")
    program = (
        "from datasets import load_from_disk; from transformers import AutoTokenizer\n"
        "from widemargin.trainer.data import cached, limits as sizes\n"
        "limits = sizes.Limits(9, 5, None, 'keep_end')\n"
        f"raw = load_from_disk('{tmp_path}/raw')\n"
        f"key = cached.fingerprint(raw, AutoTokenizer.from_pretrained('{tmp_path}'), limits)\n"
    )
    here: dict[str, Any] = {}
    exec(program, here)
    done = subprocess.run(
        [sys.executable, "-c", f"{program}print('key', key, hash('a'))"],
        env={**os.environ, "PYTHONHASHSEED": "17"},
        stdout=subprocess.PIPE,
        text=True,
    )
    key, hashed = done.stdout.split()[1:]
    assert key == here["key"]
    assert int(hashed) != hash("a")


def test_rendering_settings_are_part_of_the_cache_key() -> None:
    raw = Dataset.from_list([SAME_PAIR["messages"]])
    keys = {
        fingerprint(raw, family_tokenizer("qwen2.5"), LOOSE, rendering)
        for rendering in (None, Rendering(), Rendering(True), Rendering(empty_system=True))
    }
    assert len(keys) == 3


def test_processes_that_arrive_together_tokenize_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tokenize = PairTokenizer.__call__

    def slow(self: Any, *batch: Any) -> Any:
        calls.append(1)
        time.sleep(0.3)
        return tokenize(self, *batch)

    monkeypatch.setattr(PairTokenizer, "__call__", slow)
    raw = Dataset.from_list(make_rows(9, 1000))
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: tokenize_pairs(raw, tiny_tokenizer())[0][:], range(3)))
    assert done[0] == done[1] == done[2]
    assert len(calls) == 1


def test_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tokenize = PairTokenizer.__call__

    def counted(self: Any, *batch: Any) -> Any:
        calls.append(1)
        return tokenize(self, *batch)

    monkeypatch.setattr(PairTokenizer, "__call__", counted)
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


@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("damage", ["a bit", "half", "empty", "no seal", "another file's seal"])
def test_a_damaged_cache_is_made_again(tmp_path, caplog, monkeypatch, workers, damage) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    raw = Dataset.from_list(make_rows(30))
    settings = DataSettings(preprocessing_num_workers=workers)
    tokens = tokenize_pairs(raw, tiny_tokenizer(), settings)[0][:]
    folder = tmp_path / "widemargin"
    path, sealed = sorted(folder.glob("pairs-*.arrow"))[-1], next(folder.glob("*.sealed"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "no seal":
        sealed.unlink()
    elif damage == "another file's seal":
        sealed.write_text('{"pairs-x.arrow": "0"}')
    else:
        cut = {"a bit": content, "half": content[: len(content) // 2], "empty": b""}
        path.write_bytes(cut[damage])
    for times in (1, 1):  # the second run finds it mended
        assert tokenize_pairs(raw, tiny_tokenizer(), settings)[0][:] == tokens
        assert caplog.text.count("tokenizing again") == times


_WAITING = """
import os, sys, time
from datasets import Dataset, config
from tests.support.pair_rows import make_rows
from tests.support.tiny_tokenizers import tiny_tokenizer
from widemargin.trainer.data import DataSettings, tokenize_pairs
from widemargin.trainer.data.encoding import PairTokenizer

def wait(*_):
    os.write(1, b"waits\\n")  # at once, beside two others
    time.sleep(600)

config.HF_DATASETS_CACHE = sys.argv[1]
PairTokenizer.__call__ = wait
settings = DataSettings(preprocessing_num_workers=3)
tokenize_pairs(Dataset.from_list(make_rows(3)), tiny_tokenizer(), settings)
"""


@pytest.mark.costly
def test_no_process_stays_when_one_that_tokenizes_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _WAITING, str(tmp_path)]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert killed.stdout is not None
    assert [killed.stdout.readline() for _ in range(3)] == ["waits\n"] * 3
    killed.kill()
    killed.wait()
    try:
        end = time.monotonic() + 30
        while _is_group(killed.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not _is_group(killed.pid)
    finally:
        if _is_group(killed.pid):
            os.killpg(killed.pid, signal.SIGKILL)


def _is_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
