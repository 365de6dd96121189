"""The benchmarks' tools: called if installed and there is a judge's key, else how to call them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml

from ..errors import UserError
from ..text import printable
from .questions import read_file
from .results import write_text

ALPACA_BASELINE = "tatsu-lab/alpaca_eval:alpaca_eval_gpt4_baseline.json"
"""GPT-4 Turbo's answers, which AlpacaEval 2 compares with."""
KEY = "OPENAI_API_KEY"
"""The environment variable with the judge's key. Its value is handed on, never shown."""


def alpaca_eval(outputs: Path, judge_url: str | None, baseline: str | None, *, call: bool) -> None:
    """Have ``outputs`` judged by the installed alpaca_eval, or print the command that does.

    The tool gets the answers that it compares with as a file, AlpacaEval 2's baseline if
    ``baseline`` is None. Without one it loads them by a script, which newer datasets refuse.
    """
    installed = find_spec("alpaca_eval") is not None
    command = ["alpaca_eval", "--model_outputs", str(outputs), "--reference_outputs"]
    if call and installed and os.environ.get(KEY):
        text = read_file(baseline or ALPACA_BASELINE)
        reference = write_text(outputs.with_name("reference_outputs.json"), text)
        start = [sys.executable, "-c", "from alpaca_eval.main import main; main()"]
        extra = {"OPENAI_API_BASE": judge_url} if judge_url else {}
        _run([*start, *command[1:], str(reference)], "alpaca_eval", extra=extra)
        return
    install = "" if installed else "pip install 'widemargin[eval]' && "
    base = f"OPENAI_API_BASE={shlex.quote(judge_url)} " if judge_url else ""
    data, _, file = ALPACA_BASELINE.partition(":")
    fetched = f'"$(hf download {data} {file} --repo-type dataset --quiet)"'
    reference = fetched if baseline is None else shlex.quote(baseline)
    print(
        "The official numbers (win rate and length-controlled win rate) come from AlpacaEval's "
        f"judge:\n  {install}{base}{KEY}=... {shlex.join(command)} {reference}"
    )


def check_arena_hard(tool: Path, version: str) -> None:
    """Raise ``UserError`` unless ``tool`` is a clone of Arena-Hard with this version."""
    for file in ("gen_judgment.py", "show_result.py", f"config/{version}.yaml"):
        if not (tool / file).is_file():
            raise UserError(
                f"--arena-hard-dir {tool}: it has no {file}; give a clone of arena-hard-auto"
            )


def arena_hard(
    tool: Path | None,
    answers: Path,
    version: str,
    generator: str,
    categories: Sequence[str],
    *,
    call: bool,
) -> None:
    """Have ``answers`` judged by the clone of Arena-Hard at ``tool``, or print how to.

    The clone gets the answers. Its settings, with this model alone to judge, are written next to
    the answers; the clone's configs name judge and endpoints.
    """
    if tool is None:
        print(
            "The official numbers come from Arena-Hard's judge. With a clone of arena-hard-auto "
            f"(and its data), the same command again with\n  {KEY}=... and --arena-hard-dir CLONE"
        )
        return
    settings = _arena_settings(tool, version, generator, answers.parent.parent)
    place = tool / "data" / version / "model_answer" / answers.name
    content = answers.read_text(encoding="utf-8")
    if place.is_file() and place.read_text(encoding="utf-8") != content:
        raise UserError(
            f"{place}: it holds other answers under this name; set --generator=NAME to another, "
            "or remove it (and the judgments of it)"
        )
    write_text(place, content)
    judge = str(yaml.safe_load(settings.read_text(encoding="utf-8")).get("judge_model"))
    show = ["show_result.py", "--benchmark", version, "--judge-names", judge, "--category"]
    commands = [["gen_judgment.py", "--setting-file", str(settings.resolve())]]
    commands += [[*show, category] for category in categories]  # it takes several, and mixes them
    if call and os.environ.get(KEY):
        for command in commands:
            _run([sys.executable, *command], command[0], cwd=tool)
        return
    line = " && ".join(shlex.join(["python", *command]) for command in commands)
    print(
        "The official numbers come from Arena-Hard's judge:\n"
        f"  cd {shlex.quote(str(tool))} && export {KEY}=... && {printable(line)}"
    )


def _arena_settings(tool: Path, version: str, generator: str, folder: Path) -> Path:
    path = tool / "config" / f"{version}.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = dict(settings) | {"model_list": [generator]}
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as settings ({type(error).__name__})") from error
    return write_text(folder / "arena-hard-settings.yaml", yaml.safe_dump(settings))


def _run(
    command: Sequence[str],
    name: str,
    *,
    cwd: Path | None = None,
    extra: dict[str, str] | None = None,
) -> None:
    print(f"Running {name}", flush=True)
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **(extra or {})}, check=False)
    if done.returncode:
        raise UserError(
            f"{name}: it ended with code {done.returncode}; what it says is above. The answers "
            "are kept: the same command goes on from there"
        )
