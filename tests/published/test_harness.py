"""The comparison with the published code: what it says without a checkout, and how it reads one."""

from __future__ import annotations

from pathlib import Path

from tests.published.__main__ import main
from tests.published.original import functions

FILE = """
import not_installed_here
LIMIT = 3
class Trainer(not_installed_here.Base):
    @staticmethod
    def above(self, x: not_installed_here.Tensor) -> bool:
        return helper(x) > LIMIT
def helper(x):
    return known + x
"""


def test_without_a_checkout_it_says_how_to_get_one(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert "git clone https://github.com/princeton-nlp/SimPO" in printed
    assert "python -m tests.published --simpo SimPO" in printed


def test_functions_run_without_the_files_imports(tmp_path: Path):
    path = tmp_path / "trainer.py"
    path.write_text(FILE)
    found = functions(path, ["above", "helper", "absent"], {"known": 1}, ["LIMIT"])
    assert set(found) == {"above", "helper"}
    assert found["above"](None, 3)
    assert not found["above"](None, 2)
