"""The folders keep their order: no circles, nothing too long, tests where one looks."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("kernels", "trainer", "integrations", "bench")
MODULES_IN_A_FOLDER, LINES_OF_A_MODULE, LINES_OF_A_FUNCTION = 14, 300, 60
CODE = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PACKAGED = [it for it in CODE if ROOT / "bench" not in it.parents and it.stem != "__init__"]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    packages = ("bench", *(f"widemargin.{top}" for top in TOPS if top != "bench"))
    return grimp.build_graph(*packages, cache_dir=None)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts).removesuffix(".__init__")
    return name if parts[0] == "bench" else f"widemargin.{name}"


def packages_entered(module: str, importer: str) -> set[str]:
    """The packages whose ``__init__`` runs on the way to a module, without the importer's own."""
    parts = module.split(".")
    parents = {".".join(parts[:depth]) for depth in range(1, len(parts))}
    return {parent for parent in parents if not f"{importer}.".startswith(f"{parent}.")}


def test_no_module_imports_itself_by_a_detour(graph):
    """Imports within functions and for types count, and the ``__init__`` that an import runs."""
    imports = {}
    for module in graph.modules:
        imported = graph.find_modules_directly_imported_by(module)
        entered = {name for other in imported for name in packages_entered(other, module)}
        imports[module] = (imported | entered) & graph.modules - {module}
    TopologicalSorter(imports).prepare()


def test_a_detour_would_be_found():
    assert packages_entered("a.b.c.d", "a.x") == {"a.b", "a.b.c"}
    assert packages_entered("a.b.c", "a.b.d") == set()
    with pytest.raises(ValueError, match="cycle"):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


def test_a_folder_can_be_overlooked():
    folders = {path.parent for path in CODE}
    counts = {named(it): len([p for p in it.glob("*.py") if p.stem[:2] != "__"]) for it in folders}
    assert {name: n for name, n in counts.items() if n > MODULES_IN_A_FOLDER} == {}


@pytest.mark.parametrize("path", CODE, ids=named)
def test_a_module_and_its_functions_stay_short(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINES_OF_A_MODULE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            assert node.end_lineno - node.lineno < LINES_OF_A_FUNCTION, node.name


@pytest.mark.parametrize("path", [it for it in CODE if it.name == "__init__.py"], ids=named)
def test_a_room_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def folder_of_tests(path: Path) -> Path:
    """``tests/trainer/ROOM`` for a module of ``trainer/ROOM``; the kernels' rooms share one."""
    parts = path.relative_to(ROOT).parts[:-1]
    return ROOT / "tests" / Path(*parts[: 1 if parts[0] == "kernels" else 2])


@cache
def mentioned(path: Path) -> set[str]:
    """The modules that a test, or a helper that it imports, imports or starts by name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(re.findall(r"widemargin(?:\.\w+)+", node.value))
    helpers = [ROOT / f"{name.replace('.', '/')}.py" for name in names if name[:6] == "tests."]
    return names.union(*(mentioned(helper) for helper in helpers if helper.is_file()))


@pytest.mark.parametrize("path", PACKAGED, ids=named)
def test_a_module_has_its_tests_where_one_looks(path, graph):
    """A test of its room imports it, starts it, or imports what leads to it."""
    tests = folder_of_tests(path)
    mentions = set().union(*(mentioned(test) for test in tests.glob("test_*.py")))
    module = module_of(path)
    entries = mentions & graph.modules
    assert (
        module in mentions
        or module.removesuffix(".__main__") in mentions
        or any(graph.chain_exists(importer=entry, imported=module) for entry in entries)
    ), f"no test in {named(tests)} reaches {named(path)}"


@pytest.mark.parametrize("folder", sorted({it.parent for it in TESTS}), ids=named)
def test_make_test_quick_covers_every_room(folder, quick_files):
    files = set(folder.glob("test_*.py"))
    if not files <= quick_files.keys():
        pytest.skip("this session collects a part of the folder")
    assert any(quick_files[file] for file in files)
