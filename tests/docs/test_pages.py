"""What the pages say of the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import runpy
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from transformers import TrainingArguments
from widemargin.kernels.linear_logprob.routing import thresholds
from widemargin.trainer.cli import _parser
from widemargin.trainer.objectives import OBJECTIVES, hyperparameters_of
from widemargin.trainer.settings.config import PreferenceConfig
from widemargin.trainer.settings.files import parse_overrides
from widemargin.trainer.settings.model import AdapterSettings
from widemargin.trainer.settings.published.keys import TABLE
from widemargin.trainer.sweep.values import pairs_of

from docs.settings_table import comments, render
from tests.support.doc_pages import (
    MAKERS,
    NOT_THERE,
    OTHERS,
    PAGES,
    PLACEHOLDERS,
    ROOT,
    WRITTEN,
    engine_keys,
    fenced,
    flags,
    inline_code,
    is_printed,
    quoted_messages,
    settings,
    shell_lines,
    sources,
)

DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"


def named(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_page_has_every_hyperparameter_and_default(name):
    page = (DOCS / "objectives.md").read_text(encoding="utf-8")
    of_several, section = (
        page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        for title in ("Settings of several", name)
    )
    said = dict(re.findall(r"`(\w+)`\s+(\w+(?:\.\w+)?)", of_several + section))
    for key, field in hyperparameters_of(name).items():
        assert field.default is not dataclasses.MISSING
        assert said.get(key) == str(field.default), key


def test_settings_page_has_every_setting_of_this_project():
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert page == render(), "run python -m docs.settings_table > docs/settings.md"
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = [f.name for f in dataclasses.fields(PreferenceConfig) if f.name not in theirs]
    assert [name for name in ours if f"| `{name}` |" not in page] == []


def test_comments_of_several_lines_are_read():
    assert comments(AdapterSettings)["lora_target_modules"].startswith("Names of the modules to")
    assert comments(AdapterSettings)["lora_target_modules"].endswith("stay as they are.")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_within_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        maker = MAKERS.get(Path(target).name)
        assert (page.parent / target).exists() or (maker and (ROOT / maker).exists()), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_to_headings_lead_to_one(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        other = (page.parent / target if target else page).read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.+)$", other, re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert anchor in slugs, f"{target}#{anchor}"


def test_index_has_every_page_once():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for name in {page.name for page in DOCS.glob("*.md")} - {"README.md"} | MAKERS.keys():
        assert index.count(f"]({name})") == 1, name


@pytest.mark.costly
def test_every_quoted_message_is_printed():
    messages = quoted_messages(DOCS / "troubleshooting.md")
    assert len(messages) > 40
    assert [message for message in messages if not is_printed(message)] == []


def reasons() -> set[str]:
    """Why rows are skipped: the first argument of every `RowProblem`."""
    found = set()
    for path in (ROOT / "trainer" / "data").rglob("*.py"):
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        named = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for call in calls:
            if ast.unparse(call.func) == "RowProblem" and isinstance(call.args[0], ast.Name):
                module = importlib.import_module(f"widemargin.{named}")
                found.add(getattr(module, call.args[0].id))
    return found


def test_every_reason_for_a_skipped_row_is_explained():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    table = page[page.index("| reason | what it is |") :]
    assert len(reasons()) > 15
    assert {reason for reason in reasons() if reason not in table} == set()


def test_a_message_that_is_not_printed_would_be_found():
    assert is_printed("lora_r: expected a rank from 1 on, got …")
    assert not is_printed("lora_r: expected a rank from 2 on, got …")
    assert not is_printed("output_dir: … expected a rank from 1 on")


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_settings_that_pages_name_exist(page):
    known = settings() | engine_keys() | TABLE.keys()
    said = [re.match(r"([a-z][a-z0-9_]*):(?: |$)", code) for code in inline_code(page)]
    assert [it[1] for it in said if it and it[1] not in known] == []
    words = [
        code for code in inline_code(page) if re.fullmatch(r"[A-Za-z0-9]+(_[A-Za-z0-9]+)+", code)
    ]
    unknown = {word for word in words if not re.search(rf"\b{word}\b", sources())}
    assert unknown - known - OTHERS == set()


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_yaml_on_pages_has_known_settings(page):
    for language, text in fenced(page):
        if language == "yaml":
            keys = yaml.safe_load(text).keys()
            assert keys - settings() == set()


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_commands_on_pages_exist(page):
    commands = [line.split("#")[0].strip() for line in shell_lines(page)] + inline_code(page)
    for command in commands:
        if command.startswith("widemargin ") and len(command.split()) > 2:
            _check_widemargin(shlex.split(command)[1:])
    everything = "\n".join(commands)
    for module in re.findall(r"-m ((?:bench|widemargin)[\w.]*)", everything):
        assert find_spec(module) is not None, module
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for line in re.findall(r"^make ((?:[a-z-]+ ?)+)", everything, re.MULTILINE):
        assert set(line.split()) <= targets, line


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_options_that_pages_name_exist(page):
    known = flags() | {f"--{name}" for name in settings()} | PLACEHOLDERS
    for name in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", "\n".join(inline_code(page))):
        assert name in known or name in sources(), name


def _check_widemargin(words: list[str]) -> None:
    """The words parse, and what the command itself does not know are settings."""
    words = [word for word in words if word not in ("[--key=value", "...]")]
    if words[0] == "quickstart":
        return
    _, rest = _parser().parse_known_args(words)
    rest = [word for word in rest if word not in ("--profile", "--key=value")]
    given = dict(pairs_of(rest)) if words[0] == "sweep" else parse_overrides(rest)
    assert given.keys() - settings() - TABLE.keys() == set(), words


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_files_that_pages_name_exist(page):
    folders = "kernels|trainer|integrations|configs|bench|tests|docs|examples|containers|launch"
    endings = "py|yaml|json|png|md|sh|sbatch|Dockerfile|ipynb"
    pattern = rf"(?:{folders})/[\w./-]+\.(?:{endings})"
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(pattern, text)) - NOT_THERE
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_figure_is_what_its_script_makes():
    made = runpy.run_path(str(FIGURES / "head.py"))["figure"]()
    assert (FIGURES / "head.svg").read_text(encoding="utf-8") == made, "run docs/figures/head.py"


def test_figure_routes_as_the_head_does():
    script = runpy.run_path(str(FIGURES / "head.py"))
    masses, targets, shares, gradients = script["batch"]()
    rest = script["without_targets"](masses, targets, shares)
    grad = -torch.tensor(gradients)
    wanted = thresholds(grad, grad != 0, script["TAIL_EPS"]) <= torch.tensor(rest).T
    assert torch.equal(torch.tensor(script["active_pairs"](rest, gradients)).T, wanted)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_page_says_which_couple_pairs(name):
    spec = OBJECTIVES[name]
    page = (DOCS / "objectives.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert ("Couples pairs" in section) == spec.couples_pairs
    start = "| with a reference model |" if spec.needs_reference else "| without a reference |"
    row = next(line for line in page.splitlines() if line.startswith(start))
    assert f"`{name}`" in row.split("|")[3 if spec.couples_pairs else 2]
