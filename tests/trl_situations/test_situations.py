"""Every situation of TRL's tests runs here, or is refused with a line that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trl_situations.situation import Situation, attempt
from tests.trl_situations.table import TABLE


def _case(situation: Situation):
    marks = [pytest.mark.costly] if situation.quick else [pytest.mark.slow]
    return pytest.param(situation, id=str(situation), marks=marks)


@pytest.mark.parametrize("situation", [_case(it) for it in TABLE])
def test_it_runs_or_says_what_to_do(tmp_path, situation):
    line = attempt(situation, tmp_path)
    assert bool(line) == bool(situation.said), line
    assert situation.said in line


def test_each_is_there_once():
    names = [str(situation) for situation in TABLE]
    assert len(names) == len(set(names)) >= 122


def test_the_page_of_migration_has_their_number():
    refused = sum(bool(situation.said) for situation in TABLE)
    said = (
        f"Of {len(TABLE)} situations in TRL's own tests of its trainers, {len(TABLE) - refused} "
        f"run here and {refused} are refused with a line that says what to do"
    )
    page = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
    assert said in page.read_text(encoding="utf-8")
