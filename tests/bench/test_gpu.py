"""`bench/gpu.sh` runs on machines that no test sees: what it names must be there."""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from importlib.util import find_spec

from bench.head.providers import PROVIDERS
from bench.lib.cases import CASES
from bench.lib.record import ROOT
from bench.training.contenders import CONTENDERS, SHAPES

SCRIPT = ROOT / "bench" / "gpu.sh"
TEXT = SCRIPT.read_text(encoding="utf-8")


def array(name: str) -> set[str]:
    """The words of one of the script's arrays."""
    match = re.search(rf"^{name}=\(([^)]+)\)", TEXT, re.MULTILINE)
    assert match, name
    return set(match[1].split())


def test_modules_and_paths_are_there() -> None:
    modules = re.findall(r"-m (bench[.\w]+)", TEXT)
    assert len(set(modules)) >= 4
    assert all(find_spec(module) for module in modules)
    for module, name in re.findall(r"from (bench[.\w]+) import (\w+)", TEXT):
        assert hasattr(import_module(module), name)
    assert "tests/kernels" in TEXT
    assert (ROOT / "tests" / "kernels").is_dir()
    files = re.findall(r"tests/[\w/]+\.py", TEXT)
    assert len(files) >= 4
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_cases_and_contenders_are_known() -> None:
    assert array("ours") | array("peers") <= PROVIDERS.keys()
    assert array("layouts") <= CONTENDERS.keys()
    assert array("shapes") <= CASES.keys()
    assert set(re.findall(r"--shape ([-\w]+)", TEXT)) <= SHAPES.keys()


def test_an_unknown_step_is_an_error(tmp_path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), "HEAD", str(tmp_path), "no-such-step"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown step: no-such-step" in done.stderr
