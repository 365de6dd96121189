"""`widemargin doctor`: what is installed, what a run would use and why, whether kernels work.

A section imports what it checks, so that a package that cannot be imported is a finding.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from .findings import FAIL, OK, WARN, Finding, Findings, cause
from .machine import machine, packages


def doctor(model: str | None = None, *, as_json: bool = False) -> int:
    """Print the findings; 0 unless something fails, then 1. Raises nothing.

    Args:
        model: folder or hub name of a model whose attention and packing to tell; its weights are
            not read.
        as_json: one JSON object in place of text.
    """
    sections: dict[str, Callable[[], Findings]] = {
        "Packages": packages,
        "Machine": machine,
        "What a run would use": lambda: choices(model),
        "Kernels, against fp64": kernels,
        "Other trainers": other_trainers,
    }
    out, results = sys.stdout, {}
    # Libraries may print while they are imported: not in between the findings.
    with contextlib.redirect_stdout(sys.stderr):
        for title, check in sections.items():
            results[title] = list(_caught(check))
            if not as_json:
                print(
                    f"{title}\n" + "\n".join(map(str, results[title])) + "\n", file=out, flush=True
                )
    statuses = [finding.status for findings in results.values() for finding in findings]
    failures, warnings = statuses.count(FAIL), statuses.count(WARN)
    if as_json:
        checks = [{"section": title, **asdict(f)} for title in results for f in results[title]]
        print(json.dumps({"ok": not failures, "checks": checks}, indent=2))
    elif failures:
        print(f"{failures} to mend (fail), {warnings} to know about (warn)")
    else:
        print("Ready to train." + (f" {warnings} to know about." if warnings else ""))
    return 1 if failures else 0


def _caught(check: Callable[[], Findings]) -> Findings:
    """The findings of ``check``; one that breaks is a failure, and no traceback."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(FAIL, "this check", cause(error), "please report it with all of this output")


def choices(model: str | None) -> Findings:
    """Head, attention and packing as the settings' defaults have them, and the reasons."""
    import torch

    from .kernels import head_backend
    from .model import model_findings

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = head_backend(device)
    if backend == "triton":
        why = "a CUDA device and the package triton"
    else:
        why = "no CUDA device" if device == "cpu" else "the package triton is not installed"
    slow = backend == "torch" and device == "cuda"
    advice = "pip install triton: the kernels are several times faster" if slow else ""
    yield Finding(WARN if slow else OK, "head", f"{backend} ({why})", advice)
    yield from model_findings(model, device)


def other_trainers() -> Findings:
    """Those that can take the head."""
    from .trl import trl

    yield from trl()


def kernels() -> Findings:
    """The ops on every backend of this machine."""
    from .kernels import kernel_checks

    for check in kernel_checks():
        advice = "" if check.fine else "please report it; head_backend: torch goes without Triton"
        yield Finding(OK if check.fine else FAIL, check.name, check.detail, advice)
