"""Text for a terminal or a page that may not take it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from widemargin.trainer.text import printable, steady_console, visible

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
