"""What is installed, and which processors, memory and GPUs there are."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from .findings import FAIL, GIB, OK, WARN, Finding, Findings, cause

OLDEST_CAPABILITY = (8, 0)
"""The oldest generation of GPUs (Ampere) that the kernels are made for."""

OPTIONAL = {
    "deepspeed": ("ZeRO", "widemargin[deepspeed]"),
    "flash-attn": ("attn_implementation: flash_attention_2", "widemargin[flash-attn]"),
    "liger-kernel": ("use_liger_kernel", "widemargin[liger]"),
    "bitsandbytes": ("load_in_4bit and load_in_8bit", "widemargin[qlora]"),
}
"""Packages that a run can do without, what needs them, and what to install."""


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
    optional = {r.name: r for r in asked if r.name in OPTIONAL}
    for name in ("widemargin", *needed, *OPTIONAL):
        requirement = needed.get(name) or optional.get(name)
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
