"""`widemargin doctor`: what is installed, what a run would use and why, whether kernels work."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
GIB = 2**30
OLDEST_CAPABILITY = (8, 0)
"""The oldest generation of GPUs (Ampere) that the kernels are made for."""

OPTIONAL = {
    "deepspeed": ("ZeRO", "widemargin[deepspeed]"),
    "flash-attn": ("attn_implementation: flash_attention_2", "widemargin[flash-attn]"),
    "liger-kernel": ("use_liger_kernel", "widemargin[liger]"),
    "bitsandbytes": ("load_in_4bit and load_in_8bit", "widemargin[qlora]"),
}
"""Packages that a run can do without, what needs them, and what to install."""


@dataclass
class Finding:
    """One line of the report: how it stands with something, and what to do about it."""

    status: str
    name: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n        -> {self.advice}" if self.advice else ""
        return f"  {self.status:<5} {self.name}: {self.detail}{advice}"


Findings = Iterator[Finding]


def doctor(model: str | None = None, *, as_json: bool = False) -> int:
    """Print what is found; 0 unless something fails, then 1. Raises nothing.

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
    }
    out, found = sys.stdout, {}
    # Libraries may print while they are imported: not in between the findings.
    with contextlib.redirect_stdout(sys.stderr):
        for title, check in sections.items():
            found[title] = list(_caught(check))
            if not as_json:
                print(f"{title}\n" + "\n".join(map(str, found[title])) + "\n", file=out, flush=True)
    counts = {s: sum(f.status == s for part in found.values() for f in part) for s in (WARN, FAIL)}
    if as_json:
        checks = [{"section": title, **asdict(f)} for title in found for f in found[title]]
        print(json.dumps({"ok": not counts[FAIL], "checks": checks}, indent=2))
    elif counts[FAIL]:
        print(f"{counts[FAIL]} to mend (fail), {counts[WARN]} to know about (warn)")
    else:
        print("Ready to train." + (f" {counts[WARN]} to know about." if counts[WARN] else ""))
    return 1 if counts[FAIL] else 0


def _caught(check: Callable[[], Findings]) -> Findings:
    """The findings of ``check``; one that breaks is a failure, and no traceback."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(FAIL, "this check", cause(error), "please report it with this whole output")


def cause(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def packages() -> Findings:
    """Versions, against what this package asks for."""
    yield Finding(OK, "python", f"{platform.python_version()} on {platform.platform()}")
    from packaging.requirements import Requirement

    try:
        lines = requires("widemargin") or []
    except PackageNotFoundError:
        yield Finding(WARN, "widemargin", "runs from its files, not installed", "make setup")
        lines = []
    asked = [Requirement(line) for line in lines]
    needed = {r.name: r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}
    wanted = {r.name: r for r in asked if r.name in OPTIONAL}
    for name in ("widemargin", *needed, *OPTIONAL):
        requirement = needed.get(name) or wanted.get(name)
        yield _package(name, requirement, required=name not in OPTIONAL)


def _package(name: str, requirement: Any, *, required: bool) -> Finding:
    purpose, install = OPTIONAL.get(name, ("", name))
    advice = f"pip install '{requirement or install}'" if required else f"pip install '{install}'"
    try:
        installed = version(name)
    except PackageNotFoundError:
        if required and name != "widemargin":
            return Finding(FAIL, name, "not installed", advice)
        return Finding(OK, name, f"not installed; needed only for {purpose} ({advice})")
    if requirement is not None and not requirement.specifier.contains(installed, prereleases=True):
        bad = FAIL if required else WARN
        return Finding(bad, name, f"{installed}, expected {requirement.specifier}", advice)
    try:
        if name == "flash-attn":  # compiled for one torch, and broken by the next
            importlib.import_module("flash_attn")
    except Exception as error:
        advice = "install one built for this torch, or leave attn_implementation at sdpa"
        return Finding(WARN, name, f"{installed} cannot be imported: {cause(error)}", advice)
    return Finding(OK, name, installed)


def machine() -> Findings:
    """Processors, memory and GPUs."""
    import psutil
    import torch

    count = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    memory = psutil.virtual_memory()
    sizes = f"{memory.total / GIB:.1f} GiB of memory, {memory.available / GIB:.1f} free"
    yield Finding(OK, "CPU", f"{len(count)} cores, {sizes}")
    if not torch.cuda.is_available():
        yield _no_gpu(torch)
        return
    for i in range(torch.cuda.device_count()):
        yield _gpu(torch, i)


def _no_gpu(torch: Any) -> Finding:
    if not os.path.exists("/dev/nvidia0"):
        detail = "no CUDA device: training runs on the CPU, which is for small models"
        return Finding(WARN, "GPU", detail)
    if torch.version.cuda is None:
        detail = f"there is one, but torch {torch.__version__} is built without CUDA"
        return Finding(WARN, "GPU", detail, "install a CUDA build of torch (pytorch.org)")
    detail = f"there is one, but torch for CUDA {torch.version.cuda} cannot use it"
    return Finding(WARN, "GPU", detail, "compare with the driver's version in nvidia-smi")


def _gpu(torch: Any, index: int) -> Finding:
    facts = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    detail = (
        f"{facts.name}, {total / GIB:.1f} GiB of memory, {free / GIB:.1f} free, capability "
        f"{facts.major}.{facts.minor}, driver {_driver()}, torch for CUDA {torch.version.cuda}"
    )
    name = f"GPU {index}"
    if (facts.major, facts.minor) < OLDEST_CAPABILITY:
        detail += "; older than the kernels are made for (8.0, Ampere)"
        return Finding(WARN, name, detail, "should they fail below, set head_backend: torch")
    if free < 0.5 * total:
        return Finding(WARN, name, detail, "something else uses it: see nvidia-smi")
    return Finding(OK, name, detail)


def _driver() -> str:
    """The NVIDIA driver's version, from the file the driver keeps."""
    try:
        with open("/sys/module/nvidia/version", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return "unknown"


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


def kernels() -> Findings:
    """The ops on every backend of this machine."""
    from .kernels import kernel_checks

    for check in kernel_checks():
        advice = "" if check.fine else "please report it; head_backend: torch goes without Triton"
        yield Finding(OK if check.fine else FAIL, check.name, check.detail, advice)
