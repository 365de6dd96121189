"""Text for a terminal or a page that may not take it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from widemargin.trainer.text import printable, steady_console, unplaced, visible

STEERING = "safe\u202egnp.exe \x1b[31m\x00\ud800\x9b"


def test_what_steers_is_escaped():
    for shown in (printable(STEERING), visible(STEERING)):
        assert shown == "safe\\u202egnp.exe \\x1b[31m\\x00\\ud800\\x9b"
    assert visible("one\n\ttwo\u2009three\u00a0é") == "one\n\ttwo\u2009three\u00a0é"
    assert printable("one\ntwo") == "one\\ntwo"


class Failing(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "x"), OSError(28, "full"), ValueError("closed file")]
)
def test_a_line_that_cannot_be_written_is_lost(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    with steady_console(), steady_console():
        print("a line", flush=True)
        sys.stdout.writelines(["a", "b"])
    with pytest.raises(type(error)):
        print("outside")


def test_a_character_that_the_encoding_lacks(monkeypatch):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "latin-1", write_through=True))
    with steady_console():
        print("é → end")
    assert content.getvalue().decode("latin-1") == "é \\u2192 end\n"


def test_a_reader_that_goes_leaves_the_exit_status():
    program = (
        f"import sys; from {printable.__module__} import steady_console\n"
        "with steady_console():\n"
        "    for _ in range(20000): print('a line')\n"
        "sys.exit(3)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 3


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/someone/models/mine", "mine"),
        ("~/pairs.jsonl", "pairs.jsonl"),
        ("../data/", "data"),
        ("/", "folder"),
        ("owner/model", "owner/model"),
        ({"/a/b": 0.5, "owner/data": 1}, {"b": 0.5, "owner/data": 1}),
        (["/a/b", 3, None], ["b", 3, None]),
        ("x/" + "y" * 5000, "x/" + "y" * 5000),
        ("a/\0", "a/\0"),
    ],
)
def test_places_of_this_machine_are_named_by_their_last_part(value, shown):
    assert unplaced(value) == shown


def test_a_folder_that_looks_like_a_hub_name_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert unplaced("owner/model") == "model"
