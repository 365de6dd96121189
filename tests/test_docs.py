"""What the pages say of the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from widemargin.trainer.objectives import OBJECTIVES, hyperparameters_of

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_page_has_every_hyperparameter_and_default(name):
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    said = dict(re.findall(r"`(\w+)`\s+(\w+(?:\.\w+)?)", section))
    for key, field in hyperparameters_of(name).items():
        assert field.default is not dataclasses.MISSING
        if key != "sft_weight":
            assert said.get(key) == str(field.default), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
