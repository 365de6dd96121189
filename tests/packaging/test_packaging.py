"""The wheel, the folder mapping, and living beside Hugging Face's package named `kernels`."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "trainer", "integrations", "configs")
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "shared"
)


def run(*command: str | Path, cwd: Path, **kwargs: Any) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that setuptools leaves nothing in the tree."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", ".", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_every_folder_with_modules_is_a_declared_package(pyproject: dict[str, Any]) -> None:
    found = {
        "widemargin." + ".".join(module.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for module in (ROOT / folder).rglob("*.py")
    }
    assert set(pyproject["tool"]["setuptools"]["packages"]) == found


def test_every_direct_dependency_is_pinned(pyproject: dict[str, Any]) -> None:
    requirements = importlib.import_module("packaging.requirements")
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["dev"] + extras["bench"] + extras["deepspeed"]
    declared += [line for group in pyproject["dependency-groups"].values() for line in group]
    names = {requirements.Requirement(line).name for line in declared}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [requirements.Requirement(line) for line in lines if line and line[0] != "#"]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    assert names <= {pin.name for pin in pins}


@pytest.mark.costly
def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    content = {name for name in names if ".dist-info/" not in name}
    expected = {
        f"widemargin/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".json", ".jinja", ".txt") or path.name == "py.typed"
    }
    assert content == expected
    assert {f"widemargin/{folder}/py.typed" for folder in FOLDERS} <= content
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.costly
def test_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--no-deps", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "install", *options, "--target", site, wheel, cwd=tmp_path)
    modules = sorted(
        "widemargin." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "kernels").glob("*.py")
    )
    code = (
        "import importlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "for name in ['widemargin.trainer', 'widemargin.configs', *sys.argv[2:]]:\n"
        "    print(importlib.import_module(name).__file__)\n"
    )
    printed = run(sys.executable, "-c", code, site, *modules, cwd=tmp_path).split()
    assert len(printed) == 2 + len(modules)
    assert all(path.startswith(str(site)) for path in printed), printed


def test_kernels_folder_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "kernels/__init__.py would shadow Hugging Face's package `kernels`, which transformers "
        "imports, whenever the repository root is the working directory"
    )


@pytest.mark.costly
def test_coexists_with_hugging_face_kernels_from_the_root() -> None:
    """`python -c` puts the working directory first on the path, as `python -m` does."""
    pytest.importorskip("huggingface_hub")
    if importlib.util.find_spec("kernels") is None or _is_ours("kernels"):
        pytest.skip("Hugging Face's kernels is not installed (it is in the dev extra)")
    code = (
        "import sys; assert sys.path[0] == ''\n"
        "import kernels, transformers.modeling_utils, widemargin.kernels\n"
        "print(kernels.__file__); print(list(widemargin.kernels.__path__)[0])\n"
    )
    theirs, ours = run(sys.executable, "-c", code, cwd=ROOT).splitlines()
    assert "site-packages" in Path(theirs).parts
    assert Path(ours).name == "kernels"
    assert "site-packages" not in Path(ours).relative_to(ROOT).parts


def _is_ours(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is None
