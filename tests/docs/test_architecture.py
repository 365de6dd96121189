"""The page of the architecture names every room, and files in the order in which they import."""

from __future__ import annotations

import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (From .+)\n((?:(?!^## ).*\n)*)", PAGE, re.MULTILINE)
FLOWS = {title: re.findall(r"^\d+\. `([\w/]+\.py)`", text, re.M) for title, text in SECTIONS}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("widemargin.trainer", "widemargin.kernels", cache_dir=None)


def module_of(name: str) -> str:
    return "widemargin." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_three_flows_are_there():
    assert [len(names) > 4 for names in FLOWS.values()] == [True] * 3


@pytest.mark.parametrize("title", FLOWS)
def test_files_of_a_flow_exist(title):
    assert [name for name in FLOWS[title] if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("title", FLOWS)
def test_files_of_a_flow_import_in_its_direction(title, graph):
    """Each is reached by imports from one before it, so that none before it is reached from it."""
    modules = [module_of(name) for name in FLOWS[title]]
    for place, module in enumerate(modules[1:], start=1):
        before = modules[:place]
        assert any(graph.chain_exists(importer=it, imported=module) for it in before), module


@pytest.mark.parametrize("top", ["kernels", "trainer", "bench"])
def test_every_room_is_on_the_page(top):
    rooms = {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
    assert {name for name in rooms if not re.search(rf"\b{name}\b", PAGE)} == set()
