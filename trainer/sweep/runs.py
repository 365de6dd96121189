"""The runs of a sweep, each a process; which of them are finished, and the comparison at the end.

`sweep.json` in the sweep's folder says which settings all runs share, so that no other sweep writes
there. Whether a run has finished is read from its own folder, whoever carried it out.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..checkpoint.resume import CLAIM
from ..errors import UserError, refusals
from ..files import read_json, write_text
from ..report.write import summary_lines, write_report
from ..settings.files import build_config, merge, parse_overrides, read_yaml
from ..text import duration
from .values import Combination, combinations

RECORD = "sweep.json"
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)
"""Exit statuses of a run that somebody stopped: the sweep stops too."""


def sweep(config: Path, out: Path | None, launcher: str, arguments: Sequence[str]) -> int:
    """Train what is not finished, compare what is; 0 if every run has finished.

    Raises:
        UserError: settings that do not fit, or a folder of another sweep; nothing has been trained.
    """
    runs, fixed = combinations(arguments)
    command = _command(launcher)
    shared = merge(read_yaml(config), parse_overrides(fixed))
    if "output_dir" in parse_overrides([*fixed, *runs[0].overrides]):
        raise UserError("output_dir: leave it out; --out names the folder of a sweep")
    folder = out or Path(str(shared.get("output_dir") or "outputs/run"), "sweep")
    shared.pop("output_dir", None)
    if not launcher:  # which may start the runs on other machines
        _check(config, [[*fixed, *run.overrides] for run in runs])
    _claim(folder, shared, list(runs[0].values))
    failed: dict[str, str] = {}
    for place, run in enumerate(runs, 1):
        print(f"Run {place} of {len(runs)}: {run.name}", flush=True)
        if is_finished(folder / run.name):
            print("  it has finished already", flush=True)
            continue
        begin = time.monotonic()
        status = _train([*command, str(config), *fixed, *run.overrides], folder / run.name)
        if status in STOPPED:
            print(f"\n{run.name} was stopped; the same command goes on", file=sys.stderr)
            return status if status > 0 else 128 - status
        if not is_finished(folder / run.name):
            failed[run.name] = f"exit status {status} after {duration(time.monotonic() - begin)}"
            if not status:  # of a launcher that does not wait, or did not hand on the settings
                failed[run.name] += ", without a finished run in its folder"
    return _conclude(folder, runs, failed)


def _command(launcher: str) -> list[str]:
    """The words that start a run."""
    with refusals(f"--launcher {launcher}: close its quotation marks", ValueError):
        words = shlex.split(launcher)
    if words and not shutil.which(words[0]):
        raise UserError(
            f"--launcher: install {words[0]}, or give its path; there is no such command"
        )
    return words or [sys.executable, "-m", "widemargin.trainer"]


def is_finished(run_dir: Path) -> bool:
    """Whether a run ended well there: it wrote its summary, and left no claim on the folder."""
    try:
        notes = read_json(run_dir / "run.json")
        return "steps" in notes["summary"] and not (run_dir / CLAIM).exists()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _check(config: Path, overrides: list[list[str]]) -> None:
    """Refuse now what a run would refuse hours later; in a process, which then holds no GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_build_all, config, overrides).result()


def _build_all(config: Path, overrides: list[list[str]]) -> None:
    settings = read_yaml(config)
    for each in overrides:
        build_config(merge(settings, parse_overrides(each))).build_objective()


def _claim(folder: Path, shared: dict[str, Any], varied: list[str]) -> None:
    """Write what the sweep is to its folder, or compare it with what stands there."""
    record = json.loads(json.dumps({"varied": varied, "shared": shared}, default=str))
    path = folder / RECORD
    if path.is_file():
        try:
            before = read_json(path)
            other = "" if before == record else _other(before, record)
        except (OSError, ValueError, LookupError, TypeError):
            other = "a sweep.json of something else"
        if other:
            raise UserError(f"--out: name another folder; {folder} has {other}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=2) + "\n")


def _other(before: dict[str, Any], now: dict[str, Any]) -> str:
    if before["varied"] != now["varied"]:
        return f"a sweep over {', '.join(before['varied'])}"
    old, new = before["shared"], now["shared"]
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return f"a sweep with another {', '.join(sorted(names))}"


def _train(command: list[str], run_dir: Path) -> int:
    """The exit status. SIGTERM to the sweep goes to the run, which saves a checkpoint."""
    command = [*command, f"--output_dir={run_dir}", "--resume_from_checkpoint=auto"]
    process = subprocess.Popen(command)
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def _conclude(folder: Path, runs: Sequence[Combination], failed: dict[str, str]) -> int:
    """Print and write the comparison of the finished runs, and name the others."""
    finished = [folder / run.name for run in runs if run.name not in failed]
    if finished:
        report = write_report(finished, folder / "report.html")
        print("\n".join(["", *summary_lines(finished), "", f"Report: {report}"]))
    if failed:
        width = max(map(len, failed))
        lines = [f"  {name:{width}}  {why}" for name, why in failed.items()]
        print(
            "\n".join(["", f"Failed: {len(failed)} of {len(runs)} runs", *lines]), file=sys.stderr
        )
    return 1 if failed else 0
