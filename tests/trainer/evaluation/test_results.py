"""Records that survive a kill: nothing lost, nothing doubled, other settings refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from widemargin.trainer.errors import UserError
from widemargin.trainer.evaluation.results import Records, name

KILLED = """
import os, signal, sys
from pathlib import Path
from widemargin.trainer.evaluation.results import Records
with Records(Path(sys.argv[1]), "r", {"a": 1}) as records:
    records.append([{"id": "x"}, {"id": "y"}])
    records._file.write(b'{"id": "z", "out')
    records._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def lines(folder) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "r.jsonl").read_text().splitlines()]


def test_a_killed_process_loses_what_it_had_not_finished(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "r.jsonl").read_bytes().endswith(b'"out')
    with Records(tmp_path, "r", {"a": 1}) as records:
        assert list(records.done) == ["x", "y"]
        records.append([{"id": "y", "again": True}, {"id": "z"}])
    assert lines(tmp_path) == ["x", "y", "z"]
    with Records(tmp_path, "r", {"a": 1}) as records:
        assert records.done["y"] == {"id": "y"}


def test_text_of_any_kind(tmp_path):
    text = "a\nb\u2028c\ud800\x00 é"
    with Records(tmp_path, "r", {}) as records:
        records.append([{"id": "x", "text": text}])
    with Records(tmp_path, "r", {}) as records:
        assert records.done["x"]["text"] == text


def test_other_settings_are_refused_and_named(tmp_path):
    with Records(tmp_path, "r", {"temperature": 0.5, "ids": (1, 2)}):
        pass
    with Records(tmp_path, "r", {"temperature": 0.7, "ids": (1, 2)}) as records:  # none done yet
        records.append([{"id": "x"}])
    with Records(tmp_path, "r", {"temperature": 0.7, "ids": [1, 2]}):
        pass
    with pytest.raises(UserError, match=r"temperature: 0.7 before, 0.9 now.*--out"):
        Records(tmp_path, "r", {"temperature": 0.9, "ids": [1, 2]}).__enter__()
    (tmp_path / "r.settings.json").write_text("words")
    with pytest.raises(UserError, match=r"settings\.json"):
        Records(tmp_path, "r", {"temperature": 0.7, "ids": [1, 2]}).__enter__()
    (tmp_path / "r.settings.json").unlink()
    with pytest.raises(UserError, match="--out"):
        Records(tmp_path, "r", {"temperature": 0.7, "ids": [1, 2]}).__enter__()


def test_one_process_at_a_time(tmp_path):
    with (
        Records(tmp_path, "r", {}),
        pytest.raises(UserError, match="another process"),
    ):
        Records(tmp_path, "r", {}).__enter__()
    with Records(tmp_path, "r", {}):
        pass


def test_a_line_that_is_no_record(tmp_path):
    with Records(tmp_path, "r", {}) as records:
        records.append([{"id": "x"}])
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match=r"r\.jsonl, line 2"):
        Records(tmp_path, "r", {}).__enter__()


def test_every_flipped_bit_is_noticed(tmp_path):
    with Records(tmp_path, "r", {}) as records:
        records.append([{"id": "x", "output": "yes"}])
    path = tmp_path / "r.jsonl"
    good = path.read_bytes()
    for bit in range(8 * (len(good) - 1)):  # the last byte ends the line: a cut line is dropped
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(damaged))
        with suppress(UserError), Records(tmp_path, "r", {}) as records:
            assert records.done in ({}, {"x": {"id": "x", "output": "yes"}})


def test_threads_append_whole_lines(tmp_path):
    with Records(tmp_path, "r", {}) as records:
        threads = [
            threading.Thread(target=lambda i=i: records.append([{"id": f"{i % 20}", "t": "é" * i}]))
            for i in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(lines(tmp_path), key=int) == [str(i) for i in range(20)]


@pytest.mark.parametrize("part", ["merged", "checkpoint-100"])
def test_a_part_of_a_run_is_called_after_its_run(tmp_path, part):
    """Judges' tools keep results by this name, and every run has such a folder."""
    folder = tmp_path / "my-run" / part
    folder.mkdir(parents=True)
    assert name(str(folder)) == f"my-run-{part}"
    assert name(str(folder.parent)) == "my-run"
    assert name(f"owner/{part}") == part
