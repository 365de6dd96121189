"""Benchmarks' jobs in processes of their own, which answer in lines of JSON.

A job is a module that is run by its name from the repository's root.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.lib.record import ROOT


class WorkerError(RuntimeError):
    """A process ended without an answer: the text has its last words, `log` all of them."""

    def __init__(self, status: int, log: str) -> None:
        last = log.strip().splitlines()[-1:] or ["no output"]
        super().__init__(f"exit status {status}: {last[0]}"[:300])
        self.log = log


def answer_of(
    module: str,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> Any:
    """Run a job to its end: the JSON of its last line, or `WorkerError`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode:
        raise WorkerError(done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


class Worker:
    """A job that answers line by line: its one argument is a file with ``spec``."""

    def __init__(
        self, module: str, name: str, spec: dict[str, Any], folder: Path, **variables: str
    ) -> None:
        self.name = name
        path = folder / f"{name}.json"
        path.write_text(json.dumps(spec))
        self.log = folder / f"{name}.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(path)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env={**os.environ, **variables},
        )

    def tell(self, line: str) -> None:
        """Write a line to the worker; `WorkerError` where it has ended, as for want of memory."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self.process.wait(), self.log.read_text()) from error

    def answer(self) -> dict[str, Any]:
        """The next line of JSON, or `WorkerError`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(self.process.wait(), self.log.read_text())
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
